//! Chat templates: Jinja as `transformers` runs it, with the Python methods and helpers templates use.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind, State};
use peft_core::{Error, Result};
use serde_json::Value;

const NAME: &str = "chat_template";

/// A template that turns a conversation into text.
pub struct ChatTemplate {
    environment: Environment<'static>,
    specials: Vec<(String, Jinja)>,
}

impl ChatTemplate {
    /// Parses a template; `specials` are names it may use (`bos_token`, ...) with their texts.
    ///
    /// # Errors
    /// If it does not parse: names the line.
    pub fn new(source: &str, specials: &[(String, String)]) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(template_error)?;
        environment.set_syntax(syntax);
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(template_error)?;
        let specials = specials
            .iter()
            .map(|(n, t)| (n.clone(), Jinja::from(t.as_str())))
            .collect();
        Ok(Self {
            environment,
            specials,
        })
    }

    /// The conversation as text; `add_generation_prompt` starts the assistant's next turn.
    ///
    /// # Errors
    /// If the template refuses the messages: its own words.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let messages: Jinja = messages.iter().map(jinja).collect::<Vec<_>>().into();
        let fixed = [
            ("messages", messages),
            ("add_generation_prompt", Jinja::from(add_generation_prompt)),
            ("tools", Jinja::from(())),
            ("documents", Jinja::from(())),
        ];
        let named = self.specials.iter().map(|(n, v)| (n.as_str(), v.clone()));
        let context = Jinja::from_pairs(named.chain(fixed));
        let template = self
            .environment
            .get_template(NAME)
            .map_err(template_error)?;
        template.render(context).map_err(template_error)
    }

    /// The conversation as text with the byte ranges the assistant wrote, whatever ends its turns included.
    ///
    /// A turn begins where the conversation before it, rendered with the generation prompt, ends, and ends where the
    /// conversation up to it ends.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], or if a message has no role.
    pub fn spans(&self, messages: &[Value]) -> Result<(String, Vec<Range<usize>>)> {
        if let Some(i) = messages.iter().position(|m| !m["role"].is_string()) {
            return Err(Error::config(
                "messages",
                format!("message {i} has no `role`"),
            ));
        }
        let text = self.render(messages, false)?;
        let mut spans = Vec::new();
        for (i, _) in messages
            .iter()
            .enumerate()
            .filter(|(_, m)| m["role"] == "assistant")
        {
            let start = if i == 0 {
                0
            } else {
                common(&text, &self.render(&messages[..i], true)?)
            };
            let end = if i + 1 == messages.len() {
                text.len()
            } else {
                common(&text, &self.render(&messages[..=i], false)?)
            };
            if start < end {
                spans.push(start..end);
            }
        }
        Ok((text, spans))
    }
}

/// Bytes two texts have in common at the start, whole characters only.
fn common(a: &str, b: &str) -> usize {
    a.chars()
        .zip(b.chars())
        .take_while(|(x, y)| x == y)
        .map(|(x, _)| x.len_utf8())
        .sum()
}

/// `{% generation %}` marks the assistant's words for Hugging Face's tokenizer and changes nothing in the text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|i| open + i + 2) else {
            break;
        };
        let word = rest[open + 2..close - 2].trim_matches(['-', '+', ' ', '\t', '\n', '\r']);
        out.push_str(&rest[..open]);
        if matches!(word, "generation" | "endgeneration") {
            // A comment trims the blanks around it as the tag would have.
            out.push_str(&rest[open..close].replace("{%", "{#").replace("%}", "#}"));
        } else {
            out.push_str(&rest[open..close]);
        }
        rest = &rest[close..];
    }
    out.push_str(rest);
    out
}

fn template_error(error: minijinja::Error) -> Error {
    let place = error
        .line()
        .map(|line| format!(" (line {line} of the chat template)"))
        .unwrap_or_default();
    let detail = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    Error::config("messages", format!("{detail}{place}"))
}

fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(i), _) => Jinja::from(i),
            (None, Some(f)) => Jinja::from(f),
            (None, None) => Jinja::from(n.to_string()),
        },
        Value::String(s) => Jinja::from(s.as_str()),
        Value::Array(list) => list.iter().map(jinja).collect::<Vec<_>>().into(),
        Value::Object(map) => Jinja::from_pairs(map.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}

fn raise_exception(message: String) -> std::result::Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

type JinjaResult = std::result::Result<Jinja, minijinja::Error>;

fn refuse(detail: impl Into<String>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, detail.into())
}

/// Python's methods of strings and dictionaries that templates call.
fn python_method(_: &mut State<'_, '_>, on: &Jinja, method: &str, args: &[Jinja]) -> JinjaResult {
    let unknown = || {
        minijinja::Error::new(
            ErrorKind::UnknownMethod,
            format!("{} has no method {method}", on.kind()),
        )
    };
    let text = |i: usize| -> std::result::Result<&str, minijinja::Error> {
        args.get(i)
            .and_then(Jinja::as_str)
            .ok_or_else(|| refuse(format!("{method} takes a string")))
    };
    if let Some(s) = on.as_str() {
        let chars = match args.first() {
            Some(set) if matches!(method, "strip" | "lstrip" | "rstrip") && !set.is_none() => {
                Some(text(0)?)
            }
            _ => None,
        };
        let strips = |c: char| chars.map_or_else(|| c.is_whitespace(), |set| set.contains(c));
        let any_of = |test: &dyn Fn(&str) -> bool| -> std::result::Result<bool, minijinja::Error> {
            match args.first() {
                Some(v) if v.as_str().is_some() => Ok(test(text(0)?)),
                Some(v) => Ok(v.try_iter()?.any(|v| v.as_str().is_some_and(test))),
                None => Err(refuse(format!("{method} takes a string"))),
            }
        };
        return Ok(match method {
            "strip" => Jinja::from(s.trim_matches(strips)),
            "lstrip" => Jinja::from(s.trim_start_matches(strips)),
            "rstrip" => Jinja::from(s.trim_end_matches(strips)),
            "startswith" => Jinja::from(any_of(&|p| s.starts_with(p))?),
            "endswith" => Jinja::from(any_of(&|p| s.ends_with(p))?),
            "upper" => Jinja::from(s.to_uppercase()),
            "lower" => Jinja::from(s.to_lowercase()),
            "capitalize" => {
                let mut c = s.chars();
                let first: String = c.next().into_iter().flat_map(char::to_uppercase).collect();
                Jinja::from(first + &c.as_str().to_lowercase())
            }
            "title" => Jinja::from(title(s)),
            "replace" => match args.get(2).and_then(Jinja::as_usize) {
                Some(count) => Jinja::from(s.replacen(text(0)?, text(1)?, count)),
                None => Jinja::from(s.replace(text(0)?, text(1)?)),
            },
            "split" | "rsplit" => {
                let limit = args
                    .get(1)
                    .and_then(Jinja::as_i64)
                    .and_then(|n| usize::try_from(n).ok());
                let parts: Vec<&str> = match (args.first().filter(|v| !v.is_none()), limit) {
                    (None, _) => s.split_whitespace().collect(),
                    (Some(_), None) => s.split(text(0)?).collect(),
                    (Some(_), Some(n)) if method == "split" => s.splitn(n + 1, text(0)?).collect(),
                    (Some(_), Some(n)) => {
                        let mut parts: Vec<&str> = s.rsplitn(n + 1, text(0)?).collect();
                        parts.reverse();
                        parts
                    }
                };
                Jinja::from(parts.into_iter().map(Jinja::from).collect::<Vec<_>>())
            }
            "splitlines" => Jinja::from(s.lines().map(Jinja::from).collect::<Vec<_>>()),
            "join" => {
                let first = args.first().ok_or_else(|| refuse("join takes a list"))?;
                let parts: Vec<String> = first.try_iter()?.map(|v| v.to_string()).collect();
                Jinja::from(parts.join(s))
            }
            "count" => Jinja::from(s.matches(text(0)?).count()),
            "find" => Jinja::from(
                s.find(text(0)?)
                    .map_or(-1, |at| s[..at].chars().count() as i64),
            ),
            "isdigit" => Jinja::from(!s.is_empty() && s.chars().all(|c| c.is_ascii_digit())),
            "isalpha" => Jinja::from(!s.is_empty() && s.chars().all(char::is_alphabetic)),
            "isspace" => Jinja::from(!s.is_empty() && s.chars().all(char::is_whitespace)),
            "isupper" => {
                Jinja::from(s.chars().any(char::is_uppercase) && !s.chars().any(char::is_lowercase))
            }
            "islower" => {
                Jinja::from(s.chars().any(char::is_lowercase) && !s.chars().any(char::is_uppercase))
            }
            "removeprefix" => Jinja::from(s.strip_prefix(text(0)?).unwrap_or(s)),
            "removesuffix" => Jinja::from(s.strip_suffix(text(0)?).unwrap_or(s)),
            _ => return Err(unknown()),
        });
    }
    if on.kind() == ValueKind::Map {
        let pairs = || -> std::result::Result<Vec<(Jinja, Jinja)>, minijinja::Error> {
            on.try_iter()?
                .map(|key| on.get_item(&key).map(|value| (key, value)))
                .collect()
        };
        return Ok(match method {
            "get" => {
                let key = args.first().ok_or_else(|| refuse("get takes a key"))?;
                let value = on.get_item(key)?;
                let default = || args.get(1).cloned().unwrap_or_else(|| Jinja::from(()));
                if value.is_undefined() {
                    default()
                } else {
                    value
                }
            }
            "items" => {
                let items: Vec<Jinja> = pairs()?
                    .into_iter()
                    .map(|(k, v)| Jinja::from(vec![k, v]))
                    .collect();
                Jinja::from(items)
            }
            "keys" => Jinja::from(on.try_iter()?.collect::<Vec<_>>()),
            "values" => Jinja::from(pairs()?.into_iter().map(|(_, v)| v).collect::<Vec<_>>()),
            _ => return Err(unknown()),
        });
    }
    Err(unknown())
}

fn title(s: &str) -> String {
    let mut start = true;
    s.chars()
        .flat_map(|c| {
            let out: Vec<char> = if start {
                c.to_uppercase().collect()
            } else {
                c.to_lowercase().collect()
            };
            start = !c.is_alphabetic();
            out
        })
        .collect()
}

/// `json.dumps` as `transformers` calls it: not escaped for HTML, Python's blanks after `,` and `:`.
fn to_json(value: &Jinja, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent").ok().flatten();
    // Unknown options are for Python's encoder alone.
    let mut out = String::new();
    write_json(value, indent, 0, &mut out)?;
    Ok(out)
}

fn write_json(
    value: &Jinja,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> std::result::Result<(), minijinja::Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => {
            out.push_str(&Value::from(value.as_str().unwrap_or_default()).to_string())
        }
        ValueKind::Map => {
            out.push('{');
            let mut any = false;
            for key in value.try_iter()? {
                out.push_str(if any { comma } else { "" });
                line(out, depth + 1);
                out.push_str(&Value::from(key.to_string()).to_string());
                out.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, out)?;
                any = true;
            }
            if any {
                line(out, depth);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut any = false;
            for item in value.try_iter()? {
                out.push_str(if any { comma } else { "" });
                line(out, depth + 1);
                write_json(&item, indent, depth + 1, out)?;
                any = true;
            }
            if any {
                line(out, depth);
            }
            out.push(']');
        }
        other => return Err(refuse(format!("tojson cannot write a {other}"))),
    }
    Ok(())
}

/// The date, in UTC, for templates that tell the model today's.
fn strftime_now(format: String) -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    strftime(&format, seconds)
}

fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let days = seconds / 86_400;
    let weekday = DAYS[(days % 7) as usize];
    let (mut year, mut left) = (1970, days);
    let leap = |y: u64| y.is_multiple_of(4) && !y.is_multiple_of(100) || y.is_multiple_of(400);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = left + 1;
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 0;
    while month < 11 && left >= lengths[month] {
        left -= lengths[month];
        month += 1;
    }
    let (day, second) = (left + 1, seconds % 86_400);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{:02}", month + 1)),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('j') => out.push_str(&format!("{day_of_year:03}")),
            Some('B') => out.push_str(MONTHS[month]),
            Some('b') => out.push_str(&MONTHS[month][..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + \
        message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";

    fn render(template: &str, messages: &Value) -> Result<String> {
        let specials = [("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::new(template, &specials)?.render(messages.as_array().unwrap(), false)
    }

    #[test]
    fn spans_are_what_the_assistant_wrote() {
        let messages = json!([
            {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hällo"},
            {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"},
        ]);
        let template = ChatTemplate::new(CHATML, &[]).unwrap();
        let (text, spans) = template.spans(messages.as_array().unwrap()).unwrap();
        let written: Vec<&str> = spans.into_iter().map(|s| &text[s]).collect();
        assert_eq!(written, ["Hällo<|im_end|>\n", "See you<|im_end|>\n"]);
        assert!(text.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi"));
    }

    #[test]
    fn python_methods_and_helpers_work() {
        let messages = json!([{"role": "user", "content": "  a-b \n", "extra": {"k": [1, null, "<x>"], "f": true}}]);
        for (template, want) in [
            ("{{ messages[0]['content'].strip() }}", "a-b"),
            ("{{ messages[0].content.strip().split('-')[-1] }}", "b"),
            ("{{ messages[0].content.lstrip().startswith('a') }}", "True"),
            ("{{ bos_token }}{{ messages[0].role.upper() }}", "<s>USER"),
            (
                "{{ messages[0].extra | tojson }}",
                r#"{"k": [1, null, "<x>"], "f": true}"#,
            ),
            (
                "{{ {'a': [1]} | tojson(indent=2) }}",
                "{\n  \"a\": [\n    1\n  ]\n}",
            ),
            (
                "{% for k, v in messages[0].extra.items() %}{{ k }};{% endfor %}",
                "k;f;",
            ),
            (
                "{{ messages[0].get('nope', 'd') }}{{ messages[0].get('role') }}",
                "duser",
            ),
            (
                "{% generation %}x{% endgeneration %}\n{%- generation -%} y {%- endgeneration -%}",
                "xy",
            ),
            (
                "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
                "1",
            ),
            ("a\n{% if true %}\nb\n{% endif %}\n", "a\nb\n"),
        ] {
            assert_eq!(render(template, &messages).unwrap(), want, "{template}");
        }
    }

    #[test]
    fn errors_are_the_templates_words() {
        let messages = json!([{"role": "tool", "content": ""}]);
        let error = render("{{ raise_exception('roles must alternate') }}", &messages)
            .unwrap_err()
            .to_string();
        assert!(error.contains("roles must alternate"), "{error}");
        let error = render("\n{% if %}", &messages).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
        assert!(
            ChatTemplate::new(CHATML, &[])
                .unwrap()
                .spans(&[json!({"content": "x"})])
                .is_err()
        );
    }

    #[test]
    fn dates_are_the_calendars() {
        assert_eq!(
            strftime("%Y-%m-%d %H:%M:%S %a %j", 0),
            "1970-01-01 00:00:00 Thu 001"
        );
        assert_eq!(
            strftime("%d %B %Y, %A %%", 1_709_164_799),
            "28 February 2024, Wednesday %"
        );
        assert_eq!(strftime("%d %b %y %j", 1_735_603_200), "31 Dec 24 366");
    }
}
