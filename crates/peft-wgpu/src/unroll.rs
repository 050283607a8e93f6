//! Loops that are written out before a kernel is compiled.
//!
//! `wgpu` puts a counter into every loop, so that none runs for ever; a driver then no longer unrolls it, and what should be
//! in registers is an array in memory, ten times slower. So sources write such loops as
//!
//! ```text
//! //:for i in TM
//! acc_$i = 0.0;
//! //:end
//! ```
//!
//! where `TM` is a number or one of the names given, and `$i` is put in as a number, `$i/4` and `$i%4` as those of it. Loops
//! nest.

/// The source with its loops written out, each name of `counts` meaning its number.
pub(crate) fn unrolled(source: &str, counts: &[(&str, usize)]) -> String {
    let lines: Vec<&str> = source.lines().collect();
    let mut out = String::new();
    write(&lines, counts, &[], &mut out);
    out
}

fn write(lines: &[&str], counts: &[(&str, usize)], known: &[(String, usize)], out: &mut String) {
    let mut at = 0;
    while at < lines.len() {
        let Some((name, count)) = header(lines[at], counts) else {
            let line = known.iter().fold(lines[at].to_owned(), |line, (name, i)| {
                let forms = [("/4", i / 4), ("%4", i % 4), ("", *i)];
                forms.iter().fold(line, |line, (form, i)| {
                    line.replace(&format!("${name}{form}"), &i.to_string())
                })
            });
            out.push_str(&line);
            out.push('\n');
            at += 1;
            continue;
        };
        let end = at + 1 + body(&lines[at + 1..]);
        for i in 0..count {
            let known = [known, &[(name.to_owned(), i)]].concat();
            write(&lines[at + 1..end], counts, &known, out);
        }
        at = end + 1;
    }
}

/// The variable and the number of rounds of a line that begins a loop.
fn header<'a>(line: &'a str, counts: &[(&str, usize)]) -> Option<(&'a str, usize)> {
    let (name, count) = line.trim().strip_prefix("//:for ")?.split_once(" in ")?;
    let named = counts.iter().find(|(known, _)| *known == count);
    let count = named.map(|(_, n)| *n).or_else(|| count.parse().ok());
    Some((name, count?))
}

/// Lines up to the end of the loop that has begun.
fn body(lines: &[&str]) -> usize {
    let mut depth = 1;
    let ends = |line: &&str| {
        let line = line.trim();
        if line.starts_with("//:for ") {
            depth += 1;
        } else if line == "//:end" {
            depth -= 1;
        }
        depth == 0
    };
    lines.iter().position(ends).unwrap_or(lines.len())
}

#[cfg(test)]
mod tests {
    use super::unrolled;

    #[test]
    fn loops_are_written_out() {
        let source = "a\n//:for i in N\n b_$i\n //:for j in 2\n c_$i$j\n //:end\n//:end\nd\n";
        let want = "a\n b_0\n c_00\n c_01\n b_1\n c_10\n c_11\nd\n";
        assert_eq!(unrolled(source, &[("N", 2)]), want);
        let source = "//:for i in 6\nx_$i/4[$i%4]\n//:end\n";
        assert!(unrolled(source, &[]).ends_with("x_0[3]\nx_1[0]\nx_1[1]\n"));
        assert_eq!(unrolled("//:for i in N\nx\n//:end\n", &[("N", 0)]), "");
        assert_eq!(unrolled("plain // :for\n", &[]), "plain // :for\n");
    }
}
