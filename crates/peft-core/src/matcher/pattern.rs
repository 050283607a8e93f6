//! Patterns as Python's `re` writes them, run by the linear-time `regex` crate.
//!
//! What Python has and a linear-time engine cannot: look-ahead and look-behind, backreferences, conditionals, atomic
//! groups and possessive repetition. Each is refused by name. What the engine has and Python does not (`\p{..}`, set
//! operations in classes, the flags `U` and `R`, ...) is refused too: a configuration written here has to mean the
//! same there, and `a*+` or `[a&&b]` would silently mean something else.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use regex::Regex;
use regex_syntax::ast::{self, Ast};

use crate::{Error, Result};

/// A regular expression for the whole of a path (`re.fullmatch`).
///
/// # Errors
/// If it is none, or uses what a linear-time engine has not; the message names the construct and `field`.
pub fn compile(field: &str, pattern: &str) -> Result<Regex> {
    around(field, "", pattern, "")
}

/// The whole of a path or its last dotted parts (HF's `get_pattern_key`).
pub(super) fn ending(field: &str, pattern: &str) -> Result<Regex> {
    around(field, r"(?:.*\.)?", pattern, "")
}

/// Dotted parts anywhere in a path: the module itself and everything below it.
pub(super) fn part(field: &str, pattern: &str) -> Result<Regex> {
    around(field, r"(?:.*\.)?", pattern, r"(?:\..*)?")
}

/// The index that follows the first list of layers whose name is `pattern`, as `idx`.
pub(super) fn layer(field: &str, pattern: &str) -> Result<Regex> {
    around(field, r"(?:.*?\.)?", pattern, r"\.(?P<idx>[0-9]+)\..*")
}

/// The first number in a path that stands behind two dotted parts, as `idx`.
pub(super) fn any_layer() -> Result<Regex> {
    around(
        "layers_to_transform",
        r".*?\.",
        "[^.]*",
        r"\.(?P<idx>[0-9]+)\..*",
    )
}

/// `before`, the user's pattern and `after`, for the whole of a path. Compiled ones are kept: a configuration with a
/// pattern for each module asks for each at every module.
fn around(field: &str, before: &str, pattern: &str, after: &str) -> Result<Regex> {
    const KEPT: usize = 4096;
    static COMPILED: Mutex<Option<HashMap<String, Regex>>> = Mutex::new(None);

    let refuse = |detail: String| Error::config(field, format!("the pattern {pattern:?} {detail}"));
    let translated = translate(pattern).map_err(refuse)?;
    // A comment of a verbose pattern must not swallow the closing bracket.
    let end = if starts_verbose(&translated) {
        "\n"
    } else {
        ""
    };
    let whole = format!(r"\A{before}(?:{translated}{end}){after}\z");

    let lock = || COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(regex) = lock().get_or_insert_default().get(&whole) {
        return Ok(regex.clone());
    }
    check(&translated).map_err(refuse)?;
    let regex = Regex::new(&whole).map_err(|e| refuse(format!("cannot be compiled: {e}")))?;
    let mut kept = lock();
    let kept = kept.get_or_insert_default();
    if kept.len() >= KEPT {
        kept.clear();
    }
    kept.insert(whole, regex.clone());
    Ok(regex)
}

fn starts_verbose(pattern: &str) -> bool {
    let flags = pattern
        .strip_prefix("(?")
        .and_then(|rest| rest.split_once(')'));
    flags.is_some_and(|(flags, _)| {
        flags.contains('x') && flags.bytes().all(|b| b.is_ascii_alphabetic())
    })
}

const LINEAR: &str = "which needs backtracking; patterns here run in linear time";

/// Python's syntax to the engine's where only the spelling differs (`\Z`, `{,n}`, comments); names what there is no
/// counterpart for.
fn translate(pattern: &str) -> std::result::Result<String, String> {
    /// Group openings, longest first where one begins another.
    const GROUPS: [(&str, &str); 7] = [
        ("(?=", "look-ahead"),
        ("(?!", "negative look-ahead"),
        ("(?<=", "look-behind"),
        ("(?<!", "negative look-behind"),
        ("(?>", "an atomic group"),
        ("(?(", "a conditional group"),
        ("(?P=", "a backreference"),
    ];
    let mut out = String::with_capacity(pattern.len());
    let mut rest = pattern;
    let mut in_class = false;
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        match c {
            '\\' => {
                let escaped = rest[1..].chars().next();
                taken += escaped.map_or(0, char::len_utf8);
                match escaped {
                    Some('1'..='9') if !in_class => {
                        return Err(format!(
                            "uses a backreference ({}), {LINEAR}",
                            &rest[..taken]
                        ));
                    }
                    Some('Z') if !in_class => {
                        out.push_str(r"\z");
                        rest = &rest[taken..];
                        continue;
                    }
                    _ => {}
                }
            }
            '[' if !in_class => {
                in_class = true;
                // A closing bracket that comes first is a literal.
                let negated = usize::from(rest[1..].starts_with('^'));
                taken += negated + usize::from(rest[1 + negated..].starts_with(']'));
            }
            ']' => in_class = false,
            '{' if !in_class && rest.starts_with("{,") => {
                out.push_str("{0,");
                rest = &rest[2..];
                continue;
            }
            '(' if !in_class => {
                if let Some((opening, name)) =
                    GROUPS.iter().find(|(opening, _)| rest.starts_with(opening))
                {
                    return Err(format!("uses {name} ({opening}..), {LINEAR}"));
                }
                if rest.starts_with("(?#") {
                    let Some(length) = rest.find(')') else {
                        return Err("has a comment without an end".to_owned());
                    };
                    rest = &rest[length + 1..];
                    continue;
                }
            }
            _ => {}
        }
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    Ok(out)
}

/// Refuses what parses but means something else in Python.
fn check(pattern: &str) -> std::result::Result<(), String> {
    let tree = ast::parse::Parser::new().parse(pattern).map_err(|e| {
        format!(
            "is no regular expression: {} at character {}",
            e.kind(),
            e.span().start.column
        )
    })?;
    ast::visit(&tree, Portable { pattern })
}

struct Portable<'a> {
    pattern: &'a str,
}

impl Portable<'_> {
    fn refuse(&self, span: &ast::Span, what: &str) -> std::result::Result<(), String> {
        let text = self
            .pattern
            .get(span.start.offset..span.end.offset)
            .unwrap_or_default();
        Err(format!("uses {what} ({text})"))
    }

    fn flags(&self, flags: &ast::Flags) -> std::result::Result<(), String> {
        let foreign = [ast::Flag::SwapGreed, ast::Flag::CRLF];
        match foreign
            .into_iter()
            .find(|flag| flags.flag_state(*flag).is_some())
        {
            Some(_) => self.refuse(&flags.span, "a flag that Python's re has not"),
            None => Ok(()),
        }
    }
}

impl ast::Visitor for Portable<'_> {
    type Output = ();
    type Err = String;

    fn finish(self) -> std::result::Result<(), String> {
        Ok(())
    }

    fn visit_pre(&mut self, node: &Ast) -> std::result::Result<(), String> {
        match node {
            Ast::Repetition(outer) => match &*outer.ast {
                Ast::Repetition(_)
                    if outer.greedy && matches!(outer.op.kind, ast::RepetitionKind::OneOrMore) =>
                {
                    self.refuse(&outer.span, &format!("possessive repetition, {LINEAR}"))
                }
                Ast::Repetition(_) => self.refuse(&outer.span, "a repetition of a repetition"),
                _ => Ok(()),
            },
            Ast::ClassUnicode(class) => {
                self.refuse(&class.span, r"\p{..}, which Python's re has not")
            }
            Ast::Assertion(assertion) => match assertion.kind {
                ast::AssertionKind::WordBoundaryStart
                | ast::AssertionKind::WordBoundaryEnd
                | ast::AssertionKind::WordBoundaryStartAngle
                | ast::AssertionKind::WordBoundaryEndAngle
                | ast::AssertionKind::WordBoundaryStartHalf
                | ast::AssertionKind::WordBoundaryEndHalf => {
                    self.refuse(&assertion.span, "a word boundary that Python's re has not")
                }
                _ => Ok(()),
            },
            Ast::Flags(set) if set.span.start.offset > 0 => self.refuse(
                &set.span,
                "flags that are not at its start, which Python's re refuses",
            ),
            Ast::Flags(set) => self.flags(&set.flags),
            Ast::Group(group) => group.flags().map_or(Ok(()), |flags| self.flags(flags)),
            _ => Ok(()),
        }
    }

    fn visit_class_set_item_pre(
        &mut self,
        item: &ast::ClassSetItem,
    ) -> std::result::Result<(), String> {
        match item {
            ast::ClassSetItem::Ascii(class) => {
                self.refuse(&class.span, "a named class, which Python's re has not")
            }
            ast::ClassSetItem::Unicode(class) => {
                self.refuse(&class.span, r"\p{..}, which Python's re has not")
            }
            ast::ClassSetItem::Bracketed(class) => {
                self.refuse(&class.span, "a class in a class; escape the inner [")
            }
            _ => Ok(()),
        }
    }

    fn visit_class_set_binary_op_pre(
        &mut self,
        op: &ast::ClassSetBinaryOp,
    ) -> std::result::Result<(), String> {
        self.refuse(
            &op.span,
            "a set operation, which Python's re has not; escape the doubled sign",
        )
    }
}
