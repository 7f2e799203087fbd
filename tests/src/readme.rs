//! What the README shows, taken from the README itself, so that what is tested is what is shown.

const README: &str = include_str!("../../README.md");

/// The lines that go into Nginx's configuration.
#[must_use]
pub fn nginx_snippet() -> String {
    block("nginx")
}

/// The lines that go into the agent's configuration.
#[must_use]
pub fn toml_snippet() -> String {
    block("toml")
}

/// Every `portcullis` command in it, without the program's name, comments and repetitions.
#[must_use]
pub fn commands() -> Vec<Vec<String>> {
    let in_blocks = block("sh");
    let quoted = README.split('`').skip(1).step_by(2);
    let mut all = Vec::new();
    for text in in_blocks.lines().chain(quoted) {
        let command = text.split('#').next().unwrap_or_default();
        // Of what is piped, our end.
        let command = command.rsplit('|').next().unwrap_or_default().trim();
        if let Some(arguments) = command.strip_prefix("portcullis ") {
            let arguments = words(arguments);
            if !all.contains(&arguments) {
                all.push(arguments);
            }
        }
    }
    all
}

/// All fenced blocks of a language, one after the other.
fn block(language: &str) -> String {
    let mut text = String::new();
    let mut inside = false;
    for line in README.lines() {
        let line = line.trim_start();
        if let Some(opened) = line.strip_prefix("```") {
            inside = opened == language;
        } else if inside {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// As a shell would split it; quotation marks are all the quoting that the README needs.
fn words(command: &str) -> Vec<String> {
    let quoted = command.split('"').enumerate();
    let word = |(n, part): (usize, &str)| {
        if n % 2 == 1 {
            vec![part.to_owned()]
        } else {
            part.split_whitespace().map(str::to_owned).collect()
        }
    };
    quoted.flat_map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_a_shell_does() {
        assert_eq!(
            words(r#"ban 192.0.2.7 --reason "two words""#),
            ["ban", "192.0.2.7", "--reason", "two words"]
        );
    }
}
