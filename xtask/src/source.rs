//! Just enough of Rust's lexical structure to look at code without its comments, strings and tests.

/// What a token is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// An identifier or keyword.
    Word,
    /// The content of a string literal.
    Text,
    /// Any other character.
    Sign,
}

/// A token and the line it begins in, from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) text: String,
    pub(crate) line: usize,
}

impl Token {
    /// Whether it is this word.
    pub(crate) fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text == word
    }

    /// Whether it is this sign.
    pub(crate) fn is_sign(&self, sign: &str) -> bool {
        self.kind == Kind::Sign && self.text == sign
    }
}

/// The tokens of Rust code; comments, numbers and character literals are left out.
pub(crate) fn tokens(code: &str) -> Vec<Token> {
    Lexer {
        rest: code,
        line: 1,
        out: Vec::new(),
    }
    .run()
}

/// Without the items under `#[cfg(test)]`.
pub(crate) fn without_tests(tokens: &[Token]) -> Vec<Token> {
    const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut out = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let is_test = tokens.len() - at >= CFG_TEST.len()
            && CFG_TEST
                .iter()
                .zip(&tokens[at..])
                .all(|(want, t)| t.text == *want);
        if is_test {
            at = item_end(tokens, at + CFG_TEST.len());
        } else {
            out.push(tokens[at].clone());
            at += 1;
        }
    }
    out
}

/// Behind the item that begins at `at`: its `;`, or the bracket that closes its first `{`.
fn item_end(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0usize;
    while at < tokens.len() {
        let token = &tokens[at];
        at += 1;
        match token.text.as_str() {
            _ if token.kind != Kind::Sign => {}
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && token.text == "}" {
                    return at;
                }
            }
            ";" if depth == 0 => return at,
            _ => {}
        }
    }
    at
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    out: Vec<Token>,
}

impl Lexer<'_> {
    fn run(mut self) -> Vec<Token> {
        while let Some(c) = self.rest.chars().next() {
            if self.rest.starts_with("//") {
                self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if self.rest.starts_with("/*") {
                self.take(block_comment(self.rest));
            } else if let Some((prefix, hashes)) = raw_string(self.rest) {
                let end = format!("\"{}", "#".repeat(hashes));
                let content = self.rest[prefix..]
                    .find(&end)
                    .unwrap_or(self.rest.len() - prefix);
                self.push(Kind::Text, prefix, content, end.len());
            } else if c == '"' || self.rest.starts_with("b\"") || self.rest.starts_with("c\"") {
                let prefix = if c == '"' { 1 } else { 2 };
                let content = string_end(&self.rest[prefix..]);
                self.push(Kind::Text, prefix, content, 1);
            } else if c == '\'' {
                self.take(quote(self.rest));
            } else if c.is_alphabetic() || c == '_' {
                let length = self
                    .rest
                    .find(|c: char| !c.is_alphanumeric() && c != '_')
                    .unwrap_or(self.rest.len());
                self.push(Kind::Word, 0, length, 0);
            } else if c.is_ascii_digit() {
                self.take(
                    self.rest
                        .find(|c: char| !c.is_alphanumeric() && c != '_')
                        .unwrap_or(self.rest.len()),
                );
            } else if c.is_whitespace() {
                self.take(c.len_utf8());
            } else {
                self.push(Kind::Sign, 0, c.len_utf8(), 0);
            }
        }
        self.out
    }

    fn take(&mut self, length: usize) {
        let length = length.min(self.rest.len());
        self.line += self.rest[..length].matches('\n').count();
        self.rest = &self.rest[length..];
    }

    fn push(&mut self, kind: Kind, before: usize, length: usize, after: usize) {
        self.out.push(Token {
            kind,
            text: self.rest[before..before + length].to_owned(),
            line: self.line,
        });
        self.take(before + length + after);
    }
}

/// Length of a comment that may hold others.
fn block_comment(code: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < code.len() {
        if code[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if code[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += code[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    code.len()
}

/// `r"`, `br##"` and the like: the length of the opening and the number of hashes.
fn raw_string(code: &str) -> Option<(usize, usize)> {
    let prefix = ["r", "br", "cr"].into_iter().find(|p| {
        code.strip_prefix(p)
            .is_some_and(|rest| rest.starts_with(['#', '"']))
    })?;
    let rest = &code[prefix.len()..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    rest[hashes..]
        .starts_with('"')
        .then_some((prefix.len() + hashes + 1, hashes))
}

/// Length of a string's content up to the quote that ends it.
fn string_end(code: &str) -> usize {
    let mut escaped = false;
    for (at, c) in code.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at,
            _ => {}
        }
    }
    code.len()
}

/// Length of a character literal, or of the quote of a lifetime.
fn quote(code: &str) -> usize {
    let mut inside = code[1..].chars();
    match (inside.next(), inside.next()) {
        (Some('\\'), Some(escaped)) => {
            let from = 2 + escaped.len_utf8();
            code[from..].find('\'').map_or(1, |end| from + end + 1)
        }
        (Some(c), Some('\'')) => 2 + c.len_utf8(),
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(code: &str) -> Vec<String> {
        tokens(code)
            .into_iter()
            .map(|t| format!("{}{}", ["", "=", ""][t.kind as usize], t.text))
            .collect()
    }

    #[test]
    fn comments_strings_and_characters_are_told_apart() {
        assert_eq!(shown("a // b\n/* c /* d */ e */ f"), ["a", "f"]);
        assert_eq!(
            shown(r##"x("a\"b", r#"c"d"#, b"e")"##),
            ["x", "(", "=a\\\"b", ",", "=c\"d", ",", "=e", ")"]
        );
        assert_eq!(shown(r"'a' '\'' '\u{1F}' &'life r"), ["&", "life", "r"]);
        assert_eq!(shown("r#type 1_000f32 é"), ["r", "#", "type", "é"]);
        assert_eq!(shown("\"open"), ["=open"]);
        assert_eq!(shown("'\"' x"), ["x"]);
    }

    #[test]
    fn lines_are_counted_through_everything() {
        let lines: Vec<usize> = tokens("a\n\"x\ny\" b /*\n*/ c\n// d\ne")
            .iter()
            .map(|t| t.line)
            .collect();
        assert_eq!(lines, [1, 2, 3, 4, 6]);
    }

    #[test]
    fn test_items_are_cut_out() {
        let code = "a #[cfg(test)] mod tests { fn f() { [1]; } } b #[cfg(test)] use x; c #[cfg(not(test))] fn d() {}";
        let left: Vec<String> = without_tests(&tokens(code))
            .into_iter()
            .map(|t| t.text)
            .collect();
        assert_eq!(
            left.join(" "),
            "a b c # [ cfg ( not ( test ) ) ] fn d ( ) { }"
        );
    }
}
