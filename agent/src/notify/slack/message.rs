//! What a message to Slack says, as Block Kit JSON.

use portcullis_engine::{
    Event, Origin, Term, command::Action, detect::Finding, time::format_duration,
};
use serde_json::{Value, json};

use super::{Digest, News, Slack, Span};
use crate::notify::{Tally, Told};

/// How bad it is, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Resolved,
    Info,
    Warning,
    Critical,
}

impl Severity {
    const fn of(action: Action, observed: bool) -> Self {
        match action {
            Action::Fail | Action::Alarm | Action::Hold => Self::Critical,
            Action::Ban | Action::Extend if observed => Self::Info,
            Action::Ban | Action::Extend | Action::Refuse => Self::Warning,
            Action::Unban | Action::AllClear | Action::Resume => Self::Resolved,
            Action::Baseline | Action::Start | Action::Stop | Action::Notice => Self::Info,
        }
    }

    /// A mark for the eye, and the word.
    const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Resolved => ("🟢", "resolved"),
            Self::Info => ("🔵", "info"),
            Self::Warning => ("🟠", "warning"),
            Self::Critical => ("🔴", "critical"),
        }
    }
}

/// Slack's limits are 150 characters a header, 3,000 a section, 2,000 a field, 10 fields and 50 blocks. Free text is cut
/// before it is escaped, so no escape is; escaping makes it at most five times as long.
const HEADER: usize = 150;
const SECTION: usize = 3000;
const DETAIL: usize = 550;
const FIELD: usize = 300;
const IN_LIST: usize = 150;
/// Offenders that a digest names.
const NAMED: usize = 10;

/// What one message says, before it is laid out.
struct Said {
    headline: String,
    /// The one-line form.
    text: String,
    detail: String,
    severity: Severity,
    /// At most eight.
    fields: Vec<(&'static str, String)>,
}

impl Said {
    fn of_one(told: &Told) -> Self {
        Self {
            headline: headline(told),
            text: one_line(told),
            detail: code(&told.event.condition, DETAIL),
            severity: Severity::of(told.event.action, told.is_observed()),
            fields: fields(told),
        }
    }

    fn of_many(digest: &Digest) -> Self {
        let new = digest.new_ones();
        let severities = new
            .iter()
            .map(|(action, observed, _)| Severity::of(action, observed));
        let (headline, severity) = match &digest.so_far {
            Some(so_far) if so_far.is_over => {
                let headline = format!("Resolved: calm again after {}", count(&so_far.all));
                (headline, Severity::Resolved)
            }
            so_far => {
                let headline = so_far.map_or_else(
                    || count(&new),
                    |so_far| format!("{} so far", count(&so_far.all)),
                );
                (headline, severities.max().unwrap_or(Severity::Info))
            }
        };
        let time = digest.told.first().map(|told| told.event.time);
        let time = time.or_else(|| Some(digest.so_far?.span?.newest));
        Self {
            text: time.map_or_else(|| headline.clone(), |time| format!("[{time}] {headline}")),
            headline,
            detail: list(digest),
            severity,
            fields: digest_fields(digest),
        }
    }
}

/// The message.
pub(super) fn payload(news: &News, slack: &Slack) -> Value {
    let said = match news {
        News::One(told) => Said::of_one(told),
        News::Digest(digest) => Said::of_many(digest),
    };
    let (mark, word) = said.severity.words();
    let first = [("Severity", word.to_owned()), ("Host", slack.host.clone())];
    let fields: Vec<Value> = first
        .into_iter()
        .chain(said.fields)
        .map(|(name, value)| mrkdwn(&format!("*{name}*\n{}", code(&value, FIELD))))
        .collect();
    let header = shortened(
        &format!("{mark} {} · {}", said.headline, slack.host),
        HEADER,
    );
    let mut blocks = vec![
        json!({"type": "header", "text": {"type": "plain_text", "text": header, "emoji": false}}),
        json!({"type": "section", "text": mrkdwn(&said.detail)}),
        json!({"type": "section", "fields": fields}),
    ];
    let links = [
        ("Dashboard", &slack.links.dashboard),
        ("Runbook", &slack.links.runbook),
    ];
    let links: Vec<String> = links
        .iter()
        .filter_map(|(name, url)| link(name, url.as_deref()?))
        .collect();
    if !links.is_empty() {
        blocks.push(json!({"type": "context", "elements": [mrkdwn(&links.join(" · "))]}));
    }
    let text = shortened(&format!("{} | {}", said.text, slack.host), DETAIL);
    json!({"text": escaped(&text), "blocks": blocks})
}

/// What happened, for the header.
fn headline(told: &Told) -> String {
    let event = &told.event;
    let who = event
        .subject
        .map_or_else(|| "the site".to_owned(), |subject| subject.to_string());
    match (event.action, told.is_observed()) {
        (Action::Ban, false) => format!("Banned {who}{}", for_how_long(event)),
        (Action::Ban, true) => format!("Would ban {who}{} (only observed)", for_how_long(event)),
        (Action::Unban, false) => format!("Resolved: the ban of {who} is over"),
        (Action::Unban, true) => {
            format!("Resolved: the would-be ban of {who} is over (only observed)")
        }
        (Action::Extend, false) => format!("Still banned: {who} has not stopped"),
        (Action::Extend, true) => format!("Would still be banned: {who} (only observed)"),
        (Action::Refuse, _) => format!("Did not ban {who}"),
        (Action::Fail, _) => format!("Could not change the ban of {who}"),
        (Action::Alarm, _) => "The site's traffic is not normal".to_owned(),
        (Action::AllClear, _) => "Resolved: the site's traffic is normal again".to_owned(),
        (Action::Hold, _) => "Too many bans: only the worst are made".to_owned(),
        (Action::Resume, _) => "Resolved: all bans are made again".to_owned(),
        (Action::Baseline, _) => "Baseline computed anew".to_owned(),
        (Action::Start, _) => "Portcullis has started".to_owned(),
        (Action::Stop, _) => "Portcullis stops".to_owned(),
        (Action::Notice, _) => "Portcullis has news".to_owned(),
    }
}

/// The one-line form, for notifications and clients that show no blocks.
fn one_line(told: &Told) -> String {
    let effect = if is_harmless(told) {
        " | only observed, nothing was dropped"
    } else {
        ""
    };
    format!("{}{effect}", told.event.line(told.is_observed()))
}

/// Is it about a ban that drops nothing?
fn is_harmless(told: &Told) -> bool {
    told.is_observed() && drops_packets(told.event.action)
}

const fn drops_packets(action: Action) -> bool {
    matches!(action, Action::Ban | Action::Unban)
}

/// What is known of an event besides its condition; at most eight.
fn fields(told: &Told) -> Vec<(&'static str, String)> {
    let event = &told.event;
    let since = if matches!(event.action, Action::Ban | Action::Alarm) {
        "Since"
    } else {
        "Time"
    };
    let mut fields = vec![(since, event.time.to_string())];
    if let Some(subject) = event.subject {
        fields.push(("Subject", subject.to_string()));
    }
    if let Some(finding) = &event.finding {
        fields.push(("Current", current(finding)));
        fields.push(("Baseline", baseline(finding)));
        let test = finding.to_string();
        if !event.condition.contains(&test) {
            fields.push(("Test", test));
        }
    }
    if let Some(term) = event.term {
        let tier = event
            .tier
            .map_or_else(String::new, |tier| format!(" (tier {tier})"));
        fields.push(match (event.action, term, event.duration()) {
            (Action::Unban, Term::Permanent, _) => ("Ban was", format!("permanent{tier}")),
            (Action::Unban, Term::Until(end), _) => ("Ban was", format!("until {end}{tier}")),
            (_, Term::Until(end), Some(duration)) => (
                "Duration",
                format!("{}, until {end}{tier}", format_duration(duration)),
            ),
            (_, _, _) => ("Duration", format!("permanent{tier}")),
        });
    }
    if let Some(origin) = event.origin {
        let who = match origin {
            Origin::Detector => "detector",
            Origin::Operator => "operator",
        };
        fields.push(("Decided by", who.to_owned()));
    }
    if is_harmless(told) {
        fields.push((
            "Effect",
            "none: only observed, nothing was dropped".to_owned(),
        ));
    }
    fields
}

fn current(finding: &Finding) -> String {
    let Finding {
        rate,
        score,
        window_secs,
        requests,
        errors,
        ..
    } = finding;
    format!(
        "{rate:.2} req/s, z {score:.1} ({requests} requests in {window_secs} s, {errors} failed)"
    )
}

fn baseline(finding: &Finding) -> String {
    format!("{:.2} ± {:.2} req/s", finding.mean, finding.stddev)
}

/// So many of each kind, for the header of a digest.
fn count(all: &Tally) -> String {
    let kinds = [
        (Action::Ban, "ban"),
        (Action::Unban, "unban"),
        (Action::Extend, "extension"),
        (Action::Fail, "failure"),
        (Action::Refuse, "refusal"),
    ];
    let mut parts = Vec::new();
    for (kind, noun) in kinds {
        for harmless in [false, true] {
            let alike = |(action, observed, _): &(Action, bool, u64)| {
                *action == kind && (*observed && drops_packets(kind)) == harmless
            };
            let n: u64 = all.iter().filter(alike).map(|(_, _, n)| n).sum();
            let would_be = if harmless { "would-be " } else { "" };
            let plural = if n == 1 { "" } else { "s" };
            if n > 0 {
                parts.push(format!("{n} {would_be}{noun}{plural}"));
            }
        }
    }
    let observed = if harmless(all) > 0 {
        " (only observed)"
    } else {
        ""
    };
    format!("{}{observed}", parts.join(", "))
}

/// So many drop nothing.
fn harmless(all: &Tally) -> u64 {
    let harmless = all
        .iter()
        .filter(|(action, observed, _)| *observed && drops_packets(*action));
    harmless.map(|(_, _, n)| n).sum()
}

fn digest_fields(digest: &Digest) -> Vec<(&'static str, String)> {
    let mut fields = Vec::new();
    let new = digest.new_ones();
    if digest.so_far.is_some() && new.total() > 0 {
        fields.push(("New", count(&new)));
    }
    let spans = [
        ("Span", Span::of(&digest.told)),
        ("All of it", digest.so_far.and_then(|so_far| so_far.span)),
    ];
    for (name, span) in spans {
        if let Some(Span { first, newest }) = span {
            let length = format_duration(newest.since(first));
            fields.push((name, format!("{first} to {newest} ({length})")));
        }
    }
    if harmless(&new) > 0 {
        fields.push((
            "Effect",
            format!(
                "none for {} of {}: only observed, nothing was dropped",
                harmless(&new),
                new.total()
            ),
        ));
    }
    for (name, action) in [
        ("Newest failure", Action::Fail),
        ("Newest refusal", Action::Refuse),
    ] {
        let newest = digest
            .told
            .iter()
            .rev()
            .find(|told| told.event.action == action);
        if let Some(told) = newest {
            fields.push((name, told.event.condition.clone()));
        }
    }
    if digest.left_out.total() > 0 {
        fields.push((
            "Not listed",
            format!(
                "{} older events; the queue was full, history.jsonl has them",
                digest.left_out.total()
            ),
        ));
    }
    fields
}

/// The first offenders by rate, those whose ban is over last, each with its evidence.
fn list(digest: &Digest) -> String {
    let is_over = |told: &Told| told.event.action == Action::Unban;
    let rate = |told: &Told| {
        told.event
            .finding
            .as_ref()
            .map_or(f64::NEG_INFINITY, |finding| finding.rate)
    };
    let mut sorted: Vec<&Told> = digest.told.iter().collect();
    sorted.sort_by(|a, b| {
        is_over(a)
            .cmp(&is_over(b))
            .then(rate(b).total_cmp(&rate(a)))
    });

    // Ten lines as they are in practice fit; hostile ones may not. The rest is for the last line.
    let mut room = SECTION - 50;
    let mut lines = Vec::new();
    for told in sorted.into_iter().take(NAMED) {
        let line = list_item(told);
        let Some(left) = room.checked_sub(length(&line) + 1) else {
            break;
        };
        room = left;
        lines.push(line);
    }
    let all = digest.new_ones().total();
    let more = all.saturating_sub(lines.len() as u64);
    if all == 0 {
        lines.push("Nothing more has come.".to_owned());
    } else if more > 0 {
        lines.push(format!("… and {more} more"));
    }
    lines.join("\n")
}

fn list_item(told: &Told) -> String {
    let why = match &told.event.finding {
        Some(finding) => format!(
            "{:.2} req/s against {}; {finding}",
            finding.rate,
            baseline(finding)
        ),
        None => told.event.condition.clone(),
    };
    format!(
        "• {}: {}",
        code(&headline(told), IN_LIST),
        code(&why, IN_LIST)
    )
}

fn for_how_long(event: &Event) -> String {
    match (event.term, event.duration()) {
        (Some(Term::Permanent), _) => " permanently".to_owned(),
        (_, Some(duration)) => format!(" for {}", format_duration(duration)),
        _ => String::new(),
    }
}

/// `verbatim` keeps Slack from making links and mentions out of plain words.
fn mrkdwn(text: &str) -> Value {
    json!({"type": "mrkdwn", "text": text, "verbatim": true})
}

/// Free text as a code span: Slack finds neither formatting nor emoji in it, such as `:100:` in an IPv6 address.
fn code(text: &str, max: usize) -> String {
    let text = shortened(text, max).replace('`', "'");
    let text = text.trim();
    format!("`{}`", escaped(if text.is_empty() { "-" } else { text }))
}

/// On one line, without what turns the direction of writing, at most `max` characters long. Counted in UTF-16, where an
/// emoji is two: whichever way Slack counts, it fits.
fn shortened(text: &str, max: usize) -> String {
    let is_bidi = |c| {
        let turns = [
            '\u{200e}'..='\u{200f}',
            '\u{202a}'..='\u{202e}',
            '\u{2066}'..='\u{2069}',
        ];
        turns.iter().any(|range| range.contains(&c))
    };
    let is_break = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    let clean = text
        .chars()
        .filter(|c| !is_bidi(*c))
        .map(|c| if is_break(c) { ' ' } else { c });
    let clean: String = clean.take(max + 1).collect();
    if length(&clean) <= max {
        return clean;
    }
    let mut room = max.saturating_sub(1);
    let fits = |c: &char| {
        room.checked_sub(c.len_utf16())
            .inspect(|left| room = *left)
            .is_some()
    };
    clean.chars().take_while(fits).chain(['…']).collect()
}

fn length(text: &str) -> usize {
    text.encode_utf16().count()
}

/// The three characters that mean something to Slack everywhere.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// A link of ours. A longer address than makes sense is left out, not cut.
fn link(name: &str, url: &str) -> Option<String> {
    let url = escaped(&url.trim().replace('|', "%7C"));
    (1..=1000)
        .contains(&url.len())
        .then(|| format!("<{url}|{name}>"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portcullis_engine::{Ban, Timestamp, baseline::Learnt, detect::Test};

    use super::*;
    use crate::{
        enforce::Mode,
        notify::slack::{Links, SoFar},
    };

    const NOW: Timestamp = Timestamp::from_secs(1_700_000_000);

    fn slack() -> Slack {
        let links = Links {
            dashboard: Some("https://grafana.example/d/1?a=1&b=2".to_owned()),
            runbook: Some("https://runbook.example/|>".to_owned()),
        };
        Slack::new("edge-1", links, Duration::from_secs(1))
    }

    fn finding(rate: f64) -> Finding {
        Finding {
            test: Test::ZScore,
            threshold: 3.0,
            surge: false,
            rate,
            score: (rate - 10.0) / 2.0,
            mean: 10.0,
            stddev: 2.0,
            learnt: Learnt::Recent,
            window_secs: 60,
            requests: 1200,
            errors: 600,
            seen: NOW,
            margin: 0.0,
            value: 0.0,
            distinct: 0,
            samples: Vec::new(),
        }
    }

    fn ban(subject: &str, rate: f64, action: Action, observed: bool) -> Told {
        let finding = finding(rate);
        let ban = Ban {
            tier: Some(1),
            reason: finding.to_string(),
            finding: Some(finding),
            ..Ban::new(
                subject.parse().unwrap(),
                NOW,
                Term::Until(NOW + Duration::from_mins(10)),
                Origin::Detector,
            )
        };
        let event = Event::of_ban(NOW, action, &ban, ban.reason.clone());
        let mode = if observed {
            Mode::Observe
        } else {
            Mode::Enforce
        };
        Told { event, mode }
    }

    fn about(action: Action, condition: &str) -> Told {
        let event = Event::new(NOW, action, condition);
        Told {
            event,
            mode: Mode::Enforce,
        }
    }

    fn render(told: Told) -> Value {
        payload(&News::One(Box::new(told)), &slack())
    }

    fn render_all(digest: Digest) -> Value {
        payload(&News::Digest(Box::new(digest)), &slack())
    }

    fn left_out(bans: usize) -> Tally {
        Tally::of(&vec![ban("192.0.2.1", 20.0, Action::Ban, false); bans])
    }

    fn header(payload: &Value) -> &str {
        payload["blocks"][0]["text"]["text"].as_str().unwrap()
    }

    /// Every text object, with the most that Slack takes there.
    fn texts(payload: &Value) -> Vec<(&Value, usize)> {
        let blocks = payload["blocks"].as_array().unwrap();
        let mut texts = Vec::new();
        for block in blocks {
            match block["type"].as_str().unwrap() {
                "header" => texts.push((&block["text"], HEADER)),
                "section" if block["text"].is_object() => texts.push((&block["text"], SECTION)),
                "section" => {
                    let fields = block["fields"].as_array().unwrap();
                    assert!((1..=10).contains(&fields.len()), "{fields:#?}");
                    texts.extend(fields.iter().map(|field| (field, 2000)));
                }
                "context" => {
                    let elements = block["elements"].as_array().unwrap();
                    assert!((1..=10).contains(&elements.len()), "{elements:#?}");
                    texts.extend(elements.iter().map(|element| (element, SECTION)));
                }
                other => panic!("a block of type {other}"),
            }
        }
        texts
    }

    /// What must hold for every message, whatever was told.
    fn check(payload: &Value) {
        assert!(payload["blocks"].as_array().unwrap().len() <= 50);
        let fallback = payload["text"].as_str().unwrap();
        assert!(!fallback.is_empty() && fallback.len() < 20_000);
        assert!(!fallback.contains(['<', '>']), "{fallback}");
        for (object, limit) in texts(payload) {
            let text = object["text"].as_str().unwrap();
            let units = length(text);
            assert!((1..=limit).contains(&units), "{units} > {limit}: {text}");
            if object["type"] == "plain_text" {
                assert_eq!(object["emoji"], false);
                continue;
            }
            assert_eq!(object["verbatim"], true);
            // Our own two links aside, nothing in angle brackets, no bare ampersand, all code spans closed.
            let text = text
                .replace("<https://grafana.example/d/1?a=1&amp;b=2|Dashboard>", "")
                .replace("<https://runbook.example/%7C&gt;|Runbook>", "");
            assert!(!text.contains(['<', '>']), "{text}");
            let bare = text
                .replace("&amp;", "")
                .replace("&lt;", "")
                .replace("&gt;", "");
            assert!(!bare.contains('&'), "{text}");
            for line in text.lines() {
                assert_eq!(line.matches('`').count() % 2, 0, "{line}");
            }
            let outside: String = text.split('`').step_by(2).collect();
            assert!(!outside.contains(['@', '#', '~', '_']), "{outside}");
        }
    }

    #[test]
    fn a_ban_says_who_why_against_what_and_for_how_long() {
        let payload = render(ban("2001:db8:100:7::/64", 20.0, Action::Ban, false));
        check(&payload);
        let expected = json!({
            "text": "[2023-11-14T22:13:20.000Z] BAN 2001:db8:100:7::/64 | z 5.00 &gt; 3 | 20.00 req/s | \
                     mean 10.00 stddev 2.00 z 5.0 | 10m | edge-1",
            "blocks": [
                {"type": "header", "text": {
                    "type": "plain_text",
                    "text": "🟠 Banned 2001:db8:100:7::/64 for 10m · edge-1",
                    "emoji": false,
                }},
                {"type": "section", "text": mrkdwn("`z 5.00 &gt; 3`")},
                {"type": "section", "fields": [
                    mrkdwn("*Severity*\n`warning`"),
                    mrkdwn("*Host*\n`edge-1`"),
                    mrkdwn("*Since*\n`2023-11-14T22:13:20.000Z`"),
                    mrkdwn("*Subject*\n`2001:db8:100:7::/64`"),
                    mrkdwn("*Current*\n`20.00 req/s, z 5.0 (1200 requests in 60 s, 600 failed)`"),
                    mrkdwn("*Baseline*\n`10.00 ± 2.00 req/s`"),
                    mrkdwn("*Duration*\n`10m, until 2023-11-14T22:23:20.000Z (tier 1)`"),
                    mrkdwn("*Decided by*\n`detector`"),
                ]},
                {"type": "context", "elements": [mrkdwn(
                    "<https://grafana.example/d/1?a=1&amp;b=2|Dashboard> · <https://runbook.example/%7C&gt;|Runbook>",
                )]},
            ],
        });
        assert_eq!(payload, expected, "{payload:#}");
    }

    #[test]
    fn what_was_only_observed_says_that_nothing_was_dropped() {
        for (action, word, headline) in [
            (
                Action::Ban,
                "WOULD-BAN",
                "🔵 Would ban 192.0.2.1 for 10m (only observed) · edge-1",
            ),
            (
                Action::Unban,
                "WOULD-UNBAN",
                "🟢 Resolved: the would-be ban of 192.0.2.1 is over (only observed) · edge-1",
            ),
        ] {
            let payload = render(ban("192.0.2.1", 20.0, action, true));
            check(&payload);
            assert_eq!(header(&payload), headline);
            let fallback = payload["text"].as_str().unwrap();
            assert!(
                fallback.contains(&format!("Z] {word} 192.0.2.1 | ")),
                "{fallback}"
            );
            assert!(
                fallback.ends_with(" | only observed, nothing was dropped | edge-1"),
                "{fallback}"
            );
            let fields = payload["blocks"][2].to_string();
            assert!(
                fields.contains("none: only observed, nothing was dropped"),
                "{fields}"
            );
        }
    }

    #[test]
    fn every_kind_of_event_has_its_headline() {
        for (action, headline) in [
            (Action::Ban, "🟠 Banned the site · edge-1"),
            (
                Action::Unban,
                "🟢 Resolved: the ban of the site is over · edge-1",
            ),
            (
                Action::Extend,
                "🟠 Still banned: the site has not stopped · edge-1",
            ),
            (Action::Refuse, "🟠 Did not ban the site · edge-1"),
            (
                Action::Fail,
                "🔴 Could not change the ban of the site · edge-1",
            ),
            (
                Action::Alarm,
                "🔴 The site's traffic is not normal · edge-1",
            ),
            (
                Action::AllClear,
                "🟢 Resolved: the site's traffic is normal again · edge-1",
            ),
            (Action::Start, "🔵 Portcullis has started · edge-1"),
            (Action::Stop, "🔵 Portcullis stops · edge-1"),
            (Action::Notice, "🔵 Portcullis has news · edge-1"),
        ] {
            let payload = render(about(action, "why"));
            check(&payload);
            assert_eq!(header(&payload), headline);
        }
    }

    #[test]
    fn a_ban_that_is_over_does_not_show_what_is_left_of_it() {
        let payload = render(ban("192.0.2.1", 20.0, Action::Unban, false));
        check(&payload);
        let text = payload.to_string();
        assert!(
            text.contains("*Ban was*\\n`until 2023-11-14T22:23:20.000Z (tier 1)`"),
            "{text}"
        );
        assert!(!text.contains("*Duration*"), "{text}");
    }

    #[test]
    fn fifty_bans_are_one_message_with_the_top_ten() {
        let mut told: Vec<Told> = (0..50)
            .map(|n: u8| {
                ban(
                    &format!("192.0.2.{n}"),
                    20.0 + f64::from(n),
                    Action::Ban,
                    n.is_multiple_of(2),
                )
            })
            .collect();
        told.push(ban("198.51.100.1", 999.0, Action::Unban, false));
        told.push(ban("198.51.100.2", 0.0, Action::Fail, false));
        let payload = render_all(Digest {
            told,
            left_out: left_out(7),
            so_far: None,
        });
        check(&payload);
        assert_eq!(
            header(&payload),
            "🔴 32 bans, 25 would-be bans, 1 unban, 1 failure (only observed) · edge-1"
        );
        let list = payload["blocks"][1]["text"]["text"].as_str().unwrap();
        let lines: Vec<&str> = list.lines().collect();
        assert_eq!(lines.len(), 11, "{list}");
        let first = "• `Banned 192.0.2.49 for 10m`: `69.00 req/s against 10.00 ± 2.00 req/s; z 29.50 &gt; 3`";
        assert_eq!(lines[0], first);
        assert!(
            lines[1].contains("Would ban 192.0.2.48 for 10m (only observed)"),
            "{list}"
        );
        assert!(lines[9].contains("192.0.2.40"), "{list}");
        assert_eq!(lines[10], "… and 49 more");
        let text = payload.to_string();
        for part in [
            "7 older events",
            "none for 25 of 59",
            "*Newest failure*",
            "*Span*",
        ] {
            assert!(text.contains(part), "{part} is missing in {payload:#}");
        }
    }

    #[test]
    fn a_single_ban_does_not_hide_those_that_the_queue_had_no_room_for() {
        let told = vec![ban("192.0.2.1", 20.0, Action::Ban, false)];
        let payload = render_all(Digest {
            told,
            left_out: left_out(3),
            so_far: None,
        });
        check(&payload);
        assert_eq!(header(&payload), "🟠 4 bans · edge-1");
        assert!(
            payload.to_string().contains("3 older events"),
            "{payload:#}"
        );
    }

    #[test]
    fn in_a_flood_the_headline_is_the_running_total_and_at_its_end_the_sum() {
        let so_far = |is_over| SoFar {
            all: left_out(55),
            span: Some(Span {
                first: NOW,
                newest: NOW + Duration::from_secs(100),
            }),
            is_over,
        };
        let payload = render_all(Digest {
            told: vec![ban("192.0.2.1", 20.0, Action::Ban, false)],
            left_out: Tally::default(),
            so_far: Some(so_far(false)),
        });
        check(&payload);
        assert_eq!(header(&payload), "🟠 55 bans so far · edge-1");
        let text = payload.to_string();
        for part in ["*New*\\n`1 ban`", "2023-11-14T22:15:00.000Z (1m 40s)"] {
            assert!(text.contains(part), "{part} is missing in {payload:#}");
        }

        let payload = render_all(Digest {
            so_far: Some(so_far(true)),
            ..Digest::default()
        });
        check(&payload);
        assert_eq!(
            header(&payload),
            "🟢 Resolved: calm again after 55 bans · edge-1"
        );
        assert!(payload.to_string().contains("`resolved`"), "{payload:#}");
    }

    /// More of everything than ever comes at once.
    #[test]
    fn the_fullest_digest_keeps_to_slack_s_limits() {
        let kinds = [
            Action::Ban,
            Action::Unban,
            Action::Extend,
            Action::Fail,
            Action::Refuse,
        ];
        let told: Vec<Told> = (0..100_000_u32)
            .map(|n| {
                let [_, a, b, c] = n.to_be_bytes();
                let action = kinds[n as usize % kinds.len()];
                let subject = format!("10.{a}.{b}.{c}");
                ban(&subject, f64::from(n), action, n.is_multiple_of(3))
            })
            .collect();
        let all = Tally::of(&told);
        check(&render_all(Digest {
            told,
            left_out: all,
            so_far: Some(SoFar {
                all: Tally([[u64::MAX / 20; 2]; 5]),
                span: Some(Span {
                    first: NOW,
                    newest: NOW + Duration::from_hours(10_000),
                }),
                is_over: false,
            }),
        }));
    }

    #[test]
    fn hostile_text_neither_breaks_out_nor_exceeds_a_limit() {
        let pieces = [
            "<!channel>",
            "<@U123>",
            "&",
            "&amp;",
            "`",
            "```",
            "*_~",
            "|",
            "\n",
            "\r\n",
            "\0",
            "\u{202e}",
            "\u{2028}",
            "🧨",
            "é",
            ":100:",
            "@here",
            "#general",
            "https://evil.example/<>",
            "\"}]",
            "",
            " ",
            "'",
        ];
        // Each piece alone, in pairs, and at lengths about every limit.
        let mut texts: Vec<String> = Vec::new();
        for a in pieces {
            texts.extend(pieces.iter().map(|b| format!("{a}{b}")));
            texts.extend([1, 37, 149, 150, 151, 299, 550, 3000].map(|n| a.repeat(n)));
        }
        for text in &texts {
            let mut told = ban("2001:db8:100:7::/64", f64::MAX, Action::Ban, true);
            told.event.condition.clone_from(text);
            check(&render(told.clone()));
            told.event.action = Action::Fail;
            told.event.finding = None;
            check(&render_all(Digest {
                told: vec![told; 12],
                ..Digest::default()
            }));

            let slack = Slack {
                host: text.clone(),
                ..slack()
            };
            let news = News::One(Box::new(about(Action::Notice, text)));
            check(&payload(&news, &slack));
        }
    }

    #[test]
    fn without_links_there_is_no_context_line() {
        let links = Links {
            dashboard: None,
            runbook: Some(String::new()),
        };
        let slack = Slack { links, ..slack() };
        let news = News::One(Box::new(about(Action::Start, "why")));
        let payload = payload(&news, &slack);
        assert_eq!(
            payload["blocks"].as_array().unwrap().len(),
            3,
            "{payload:#}"
        );
    }
}
