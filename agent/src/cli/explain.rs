//! `portcullis explain`: what is known of somebody, in the words of one who is asked at night.

use std::{fmt::Write as _, time::Duration};

use portcullis_engine::{
    Ban, Explanation, Gate, Origin, Subject, Term, Timestamp,
    baseline::Learnt,
    detect::{Finding, Sample, Test},
    explain::{Known, Limits, Spared},
    time::format_duration,
};

use crate::{enforce::Mode, runtime::Explained};

/// From this share of what flags on somebody is close to a ban.
const CLOSE: f64 = 0.8;

/// The page.
pub(super) fn words(explained: &Explained) -> String {
    let known = &explained.known;
    let mut page = Page::default();
    if known.asked != known.subject {
        page.say(&format!(
            "{} is counted and banned with its network, {}",
            known.asked, known.subject
        ));
    }
    match (known.bans.split_first(), &known.spared) {
        (Some((ban, wider)), spared) => {
            page.say(&headline(known, ban));
            page.line("where", &place(explained, ban));
            why(ban, &mut page);
            for wider in wider {
                page.line(
                    "also",
                    &format!("{} is banned {}", wider.subject, term(wider, known.time)),
                );
            }
            spared_in_words(spared.as_ref(), &mut page);
            account(known, &mut page);
            ways_out(known, ban, &mut page);
        }
        (None, Some(spared)) if spared.is_whole => {
            page.say(&format!("{} is never banned", known.subject));
            spared_in_words(Some(spared), &mut page);
            now(known, &mut page);
        }
        (None, _) if is_unknown(known) => page.say(&unknown(known)),
        (None, spared) => {
            page.say(&not_banned(known));
            spared_in_words(spared.as_ref(), &mut page);
            now(known, &mut page);
            account(known, &mut page);
            if known.client.is_some() {
                page.line("to do", &allow(known.subject));
            }
        }
    }
    page.0
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn say(&mut self, words: &str) {
        let _ = writeln!(self.0, "{words}");
    }

    fn line(&mut self, name: &str, words: &str) {
        let _ = writeln!(self.0, "{name:<10}{words}");
    }
}

/// Names and operators' words may hold anything; a terminal must not be told what to do by them.
fn clean(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn seconds(secs: u64) -> String {
    format_duration(Duration::from_secs(secs))
}

fn count(number: u64, one: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {one}{plural}")
}

/// With as many digits as one looks at.
fn figure(value: f64) -> String {
    if value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

fn headline(known: &Explanation, ban: &Ban) -> String {
    let Explanation { asked, .. } = known;
    let part = if ban.subject.covers(known.subject) && ban.subject != known.subject {
        format!(" as part of {}", ban.subject)
    } else {
        String::new()
    };
    let tier = match (ban.origin, ban.tier) {
        (Origin::Operator, _) => ", by an operator".to_owned(),
        (Origin::Detector, Some(tier)) => format!(", tier {tier}"),
        (Origin::Detector, None) => String::new(),
    };
    format!(
        "{asked} is banned{part} since {}, {}{tier}",
        ban.since,
        term(ban, known.time)
    )
}

fn term(ban: &Ban, now: Timestamp) -> String {
    match ban.term {
        Term::Permanent => "for good".to_owned(),
        Term::Until(end) => format!("until {end} ({} left)", seconds(end.since(now).as_secs())),
    }
}

fn place(explained: &Explained, ban: &Ban) -> String {
    let wire = format!("at the wire ({} on {})", explained.backend, explained.place);
    let gate = match ban.gate {
        Gate::Wire => wire,
        Gate::Nginx => "in Nginx, since it came through a proxy".to_owned(),
        Gate::Both => format!("{wire} and in Nginx"),
    };
    let is_observed = ban.observe || explained.mode == Mode::Observe;
    let effect = match explained.entry {
        _ if !ban.gate.has_wire() && is_observed => "only observed: it is not refused".to_owned(),
        _ if !ban.gate.has_wire() => "in force; what Nginx refuses is not counted".to_owned(),
        Some(held) => {
            let done = if is_observed {
                "only observed: nothing is dropped"
            } else {
                "in force"
            };
            let newest = held.last_seen_secs.map_or_else(String::new, |secs| {
                format!(", the newest {} ago", seconds(secs))
            });
            format!("{done}; {} matched{newest}", count(held.hits, "packet"))
        }
        None => "NOT in force: the back end has no entry for it; `portcullis status` says why"
            .to_owned(),
    };
    format!("{gate}; {effect}")
}

fn why(ban: &Ban, page: &mut Page) {
    let Some(finding) = &ban.finding else {
        page.line("why", &clean(&ban.reason));
        return;
    };
    page.line("why", &cause(finding));
    if finding.margin > 0.0 {
        page.line(
            "",
            &format!(
                "only a sample of the lines was read: {:.2} a second were taken off for its error",
                finding.margin
            ),
        );
    }
    if let Test::ZScore | Test::TimesMean = finding.test {
        page.line(
            "normal",
            &normal(finding.mean, finding.stddev, finding.learnt),
        );
    }
    lines(&finding.samples, page);
}

/// What a test has found, with the threshold.
fn cause(finding: &Finding) -> String {
    let Finding {
        threshold,
        rate,
        score,
        mean,
        requests,
        errors,
        value,
        distinct,
        ..
    } = finding;
    let limit = figure(*threshold);
    let span = seconds(finding.window_secs.into());
    let sent = format!(
        "it sent {} in {span}, {rate:.2} a second",
        count(*requests, "request")
    );
    let surge = if finding.surge {
        format!("; the limit was tightened since {errors} of {requests} failed")
    } else {
        String::new()
    };
    match finding.test {
        Test::ZScore => format!(
            "too many requests: {sent}. That is {score:.1} standard deviations above normal (z); more than {limit} flags{surge}"
        ),
        Test::TimesMean => format!(
            "too many requests: {sent}. That is {:.1} times the mean of the whole site; more than {limit} times flags{surge}",
            rate / mean
        ),
        Test::Ceiling => format!(
            "too many requests: {sent}. Nothing was learnt yet, and until then more than {limit} a second flags"
        ),
        Test::Cap => format!(
            "too much work: what it asked for within {span} counts as {value:.0} full requests; more than {limit} flags. What \
             comes with a page, and pages that are new to it, count for less"
        ),
        Test::Failures => {
            let paths = if *distinct > 0 {
                format!(", {distinct} different paths or more")
            } else {
                String::new()
            };
            format!(
                "it fails as those do who guess paths or passwords: {errors} of {requests} answers{paths}. Score {value:.1}; more \
                 than {limit} flags"
            )
        }
        Test::OnePage => format!(
            "while the site was attacked it came, new, and asked for one page again and again and for nothing that comes with \
             one: {value:.0} pages in {}; from {limit} on that is held against it",
            count(*requests, "request")
        ),
        Test::InventedPages => format!(
            "while the site was attacked it came, new, and asked for pages that nobody else has found: {value:.0} in {}; from \
             {limit} on it is judged by how it asks",
            count(*requests, "request")
        ),
        Test::BarePages => format!(
            "while the site was attacked it came, new, and asked for pages and for nothing of what browsers load with them: \
             {value:.0} in {}; from {limit} on it is judged by how it asks",
            count(*requests, "request")
        ),
        Test::Members => format!(
            "{value:.0} of its members are banned, and nobody in it behaves; from {limit} on all of it is"
        ),
    }
}

fn normal(mean: f64, stddev: f64, learnt: Learnt) -> String {
    let from = match learnt {
        Learnt::WarmUp => "nothing is learnt yet".to_owned(),
        Learnt::Recent => "learnt from the recent past".to_owned(),
        Learnt::Hour(hour) => format!("learnt from hour {hour} UTC"),
    };
    format!("the whole site: mean {mean:.2} a second, standard deviation {stddev:.2} ({from})")
}

/// Where the lines are, and how to look at them.
fn lines(samples: &[Sample], page: &mut Page) {
    let mut label = "lines";
    for log in samples.chunk_by(|a, b| a.log == b.log) {
        let Some(name) = log.first().map(|sample| sample.log.as_str()) else {
            continue;
        };
        if name.is_empty() {
            continue;
        }
        if name.starts_with('/') {
            let bytes: Vec<String> = log.iter().map(|sample| sample.offset.to_string()).collect();
            page.line(
                label,
                &format!("{} at byte {}", clean(name), bytes.join(", ")),
            );
            if let (Some(newest), false) = (log.first(), name.contains(char::is_control)) {
                // tail counts from one.
                let from = newest.offset.saturating_add(1);
                page.line("", &format!("tail -c +{from} {} | head -n 1", quoted(name)));
            }
        } else {
            // What comes by syslog lies nowhere.
            page.line(
                label,
                &format!("came by {}, and are kept nowhere", clean(name)),
            );
        }
        label = "";
    }
}

/// As a shell takes it for one word.
fn quoted(name: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%".contains(c);
    if name.chars().all(is_plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', r"'\''"))
    }
}

fn spared_in_words(spared: Option<&Spared>, page: &mut Page) {
    let Some(Spared {
        entry,
        why,
        is_whole,
    }) = spared
    else {
        return;
    };
    let entry = Subject::of_net(*entry);
    let what = format!("{entry} is on the allowlist: {why}");
    if *is_whole {
        page.line("spared", &what);
    } else {
        page.line(
            "spared",
            &format!("{what}, a part of it, so that the detector does not ban it"),
        );
    }
}

fn is_unknown(known: &Explanation) -> bool {
    let is_clear = known.client.is_none() && known.offences.is_none() && known.spared.is_none();
    let is_clear = is_clear && known.refused_until.is_none();
    is_clear && known.bans_inside == 0 && !known.is_regular
}

fn unknown(known: &Explanation) -> String {
    let asked = known.asked;
    if known.subject.is_client() {
        format!(
            "nothing is known of {asked}: no recent request, no ban, no offence, no entry of the allowlist"
        )
    } else {
        format!(
            "nothing is known of {asked}: neither it nor a part of it is banned. Requests are counted for each address (IPv6: /64): \
             ask for one"
        )
    }
}

fn not_banned(known: &Explanation) -> String {
    let subject = known.subject;
    if known.bans_inside > 0 {
        let inside = count(known.bans_inside as u64, "ban");
        return format!(
            "{subject} is not banned; there are {inside} of parts of it (`portcullis bans`)"
        );
    }
    let nearest = known.client.as_ref().map(nearest);
    match nearest {
        Some((share, what)) if share >= CLOSE => {
            let share = share * 100.0;
            format!(
                "{subject} is not banned, but close to it: {what} at {share:.0} % of what flags"
            )
        }
        _ => format!("{subject} is not banned"),
    }
}

/// The test that somebody is closest to, and how close: 1 flags.
fn nearest(client: &Known) -> (f64, &'static str) {
    let mut all = match client.limits {
        Limits::Ceiling(ceiling) => vec![((client.rate - client.margin) / ceiling, "its rate is")],
        Limits::Normal {
            z_score,
            times_mean,
            ..
        } => vec![
            (client.score / z_score, "its rate (z) is"),
            (
                client.times_mean / times_mean,
                "its rate (times the mean) is",
            ),
        ],
    };
    let spans = client.spans.iter().filter(|span| span.cap > 0.0);
    all.extend(spans.map(|span| (span.effort / span.cap, "its work is")));
    let failures = client.failures.iter();
    all.extend(failures.map(|failing| {
        (
            failing.now.score / failing.limit,
            "the score of its failing answers is",
        )
    }));
    all.into_iter()
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .unwrap_or_default()
}

/// What it does, and how far that is from what flags.
fn now(known: &Explanation, page: &mut Page) {
    if known.refused_until.is_some() {
        page.line(
            "flagged",
            "within the last minutes, and not banned; history.jsonl says why (\"action\":\"refuse\")",
        );
    }
    let Some(client) = &known.client else {
        if known.is_regular {
            page.line(
                "now",
                "it has been here within a day or so, and nothing was held against it",
            );
        }
        return;
    };
    let window = seconds(client.window_secs.into());
    page.line(
        "now",
        &format!(
            "{} in the last {window}, {} failed; first seen {}, last {}",
            count(client.requests, "request"),
            client.errors,
            client.since,
            client.last
        ),
    );
    let rate = format!("{:.2} a second", client.rate);
    match client.limits {
        Limits::Ceiling(ceiling) => page.line(
            "rate",
            &format!("{rate} of {} (nothing is learnt yet)", figure(ceiling)),
        ),
        Limits::Normal {
            z_score,
            times_mean,
            is_surge,
        } => {
            let surge = if is_surge {
                "; limits are tightened, since its requests fail"
            } else {
                ""
            };
            page.line(
                "rate",
                &format!(
                    "{rate}: z {:.1} of {}, {:.1} of {} times the mean{surge}",
                    client.score,
                    figure(z_score),
                    client.times_mean,
                    figure(times_mean)
                ),
            );
            let of = &known.normal;
            page.line("normal", &normal(of.mean, of.stddev, of.learnt));
        }
    }
    if client.margin > 0.0 {
        let margin = client.margin;
        page.line(
            "",
            &format!("of a sample of the lines; {margin:.2} a second are taken off for its error"),
        );
    }
    doings(known, client, page);
    lines(&client.samples, page);
}

/// What it does beside how much.
fn doings(known: &Explanation, client: &Known, page: &mut Page) {
    let spans: Vec<String> = client
        .spans
        .iter()
        .filter(|span| span.cap > 0.0)
        .map(|span| {
            let (effort, cap) = (figure(span.effort), figure(span.cap));
            format!("{effort} of {cap} in {}", seconds(span.secs.into()))
        })
        .collect();
    if !spans.is_empty() {
        page.line("work", &format!("full requests: {}", spans.join(", ")));
    }
    if let Some(failing) = client.failures {
        let (now, limit) = (failing.now, figure(failing.limit));
        page.line(
            "failures",
            &format!(
                "score {:.1} of {limit}: {} of {} answers failed, {} of {} different paths",
                now.score, now.failures, now.answers, now.distinct, failing.distinct_limit
            ),
        );
    }
    if client.room > 1.0 {
        let room = figure(client.room);
        page.line(
            "shared",
            &format!("many people seem to share it: its limits are {room} times as high"),
        );
    }
    if client.usual > 1.0 {
        let times = figure(client.usual);
        page.line(
            "usual",
            &format!(
                "it has done much for long: the limits of its spans are {times} times as high"
            ),
        );
    }
    if let (true, Some(manner)) = (known.is_attacked, client.manner) {
        let who = if client.is_newcomer {
            "it came with the attack on the site and is held to how it asks"
        } else {
            "the site is attacked, but it was here before"
        };
        page.line(
            "attack",
            &format!(
                "{who}: {:.0} % for what comes with pages, {:.0} % of its pages found by others, {:.0} % more for one page than for all others",
                manner.with_pages * 100.0,
                manner.known * 100.0,
                manner.lead * 100.0
            ),
        );
    }
}

fn account(known: &Explanation, page: &mut Page) {
    let past = match known.offences {
        None => "no offence".to_owned(),
        Some(offences) if offences.count == 0 => {
            format!("no offence since it was pardoned at {}", offences.last)
        }
        Some(offences) => format!(
            "{}, last dealt with at {}",
            count(offences.count.into(), "offence"),
            offences.last
        ),
    };
    let next = known.next_secs.map_or_else(
        || "for good".to_owned(),
        |secs| format!("for {}", seconds(secs)),
    );
    page.line(
        "account",
        &format!(
            "{past}; the next one bans it {next} (tier {})",
            known.next_tier
        ),
    );
}

/// What an operator can do.
fn ways_out(known: &Explanation, ban: &Ban, page: &mut Page) {
    let everybody = if ban.subject.covers(known.subject) && ban.subject != known.subject {
        ", for everybody in it"
    } else {
        ""
    };
    page.line(
        "to do",
        &format!(
            "`portcullis unban {}` lifts the ban and forgets its offences{everybody}",
            ban.subject
        ),
    );
    page.line("", &allow(known.subject));
}

fn allow(subject: Subject) -> String {
    format!("`portcullis allow add {subject}` keeps it from ever being banned")
}

#[cfg(test)]
mod tests;
