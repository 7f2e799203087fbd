//! `portcullis import` and `portcullis export`: files and the agent on either side of [`exchange`].

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::File,
    io::{self, BufWriter, Read, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use jiff::tz::TimeZone;
use portcullis_engine::{Ban, Origin, Subject, Term, ledger::Length};

use super::{Failure, Reach, fetch, is_broken_pipe, parse_length, print, replay::plural};
use crate::{
    control::{self, Request, Wanted},
    exchange::{self, Entry, Form, Format, Here, List, MAX_BYTES, MAX_ENTRIES},
    runtime::{BanRow, BannedMany, clock},
};

#[derive(Debug, Args)]
pub(super) struct Import {
    /// Lists; `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What they are written in
    #[arg(long, value_enum, default_value_t = Written::Auto)]
    format: Written,
    /// Ban for so long, in place of what the lists say: 90s, 10m, 2h, 1d …
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_length)]
    length: Option<Duration>,
    /// Why, in place of what the lists say
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Print who would be banned, and ask no agent
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Written {
    /// By how each begins
    Auto,
    /// Objects in an array, or one a line
    Json,
    /// With a header
    Csv,
    /// An address, a prefix or a range a line
    Plain,
    /// As `fail2ban-client` prints it
    Fail2ban,
    /// As `cscli decisions list -o json` or `-o raw` prints it
    Crowdsec,
}

impl Written {
    const fn format(self) -> Option<Format> {
        Some(match self {
            Self::Auto => return None,
            Self::Json => Format::Json,
            Self::Csv => Format::Csv,
            Self::Plain => Format::Plain,
            Self::Fail2ban => Format::Fail2ban,
            Self::Crowdsec => Format::Crowdsec,
        })
    }
}

#[derive(Debug, Args)]
pub(super) struct Export {
    /// How they are written
    #[arg(long, value_enum, default_value_t = Writing::Json)]
    format: Writing,
    /// The detector's bans, too
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    reach: Reach,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Writing {
    /// An object a line
    Json,
    /// With a header
    Csv,
    /// Subjects alone, one a line
    Plain,
}

/// Refusals of a kind that are shown.
const SHOWN: usize = 20;

/// Prints bans, in the order of their subjects.
pub(super) fn export(wanted: &Export) -> Result<(), Failure> {
    let rows: Vec<BanRow> = fetch(&wanted.reach.socket, &Request::Bans)?;
    let mut bans: Vec<Ban> = rows.into_iter().map(|row| row.ban).collect();
    bans.retain(|ban| wanted.all || ban.origin == Origin::Operator);
    bans.sort_by_key(|ban| ban.subject);
    let form = match wanted.format {
        Writing::Json => Form::Json,
        Writing::Csv => Form::Csv,
        Writing::Plain => Form::Plain,
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let written = exchange::write(&bans, form, &mut out).and_then(|()| out.flush());
    match written.context("cannot write to standard output") {
        // Whoever reads has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => Ok(result?),
    }
}

/// Reads all lists, then bans; says whether all of it was understood and is in force.
pub(super) fn import(wanted: &Import) -> Result<bool, Failure> {
    let (now, zone) = (clock::wall(), TimeZone::system());
    let here = Here { now, zone: &zone };
    let mut bans = Vec::new();
    let mut is_understood = true;
    for file in &wanted.files {
        let list = exchange::read(&text_of(file)?, wanted.format.format(), here);
        is_understood &= list.misunderstood == 0;
        tell(file, &list, wanted.length.is_some());
        bans.extend(list.entries().map(|entry| Wanted {
            subject: entry.subject,
            term: match wanted.length {
                Some(length) => Length::For(length).from(now),
                None => entry.term.unwrap_or(Term::Permanent),
            },
            reason: reason(wanted, entry),
            observe: entry.observe,
        }));
        if bans.len() > MAX_ENTRIES {
            return Err(Failure(
                1,
                anyhow::anyhow!("over {MAX_ENTRIES} bans: import fewer lists at a time"),
            ));
        }
    }
    if wanted.dry_run {
        print(&table(&bans))?;
        return Ok(is_understood);
    }
    let mut all = BannedMany::default();
    for bans in requests(bans) {
        let request = Request::BanMany { bans };
        let answer: BannedMany =
            fetch(&wanted.reach.socket, &request).map_err(|Failure(code, error)| {
                let done = all.banned + all.stood;
                let context = format!(
                    "{} banned before this; import again once it is put right",
                    plural(done as u64, "subject")
                );
                Failure(
                    code,
                    if done > 0 {
                        error.context(context)
                    } else {
                        error
                    },
                )
            })?;
        all.banned += answer.banned;
        all.stood += answer.stood;
        all.over += answer.over;
        all.refused.extend(answer.refused);
        all.failed.extend(answer.failed);
    }
    print(&summary(&all))?;
    Ok(is_understood && all.refused.is_empty() && all.failed.is_empty())
}

fn text_of(file: &Path) -> Result<Vec<u8>> {
    let name = || format!("cannot read {}", file.display());
    let mut text = Vec::new();
    let mut read = |from: &mut dyn Read| from.take(MAX_BYTES + 1).read_to_end(&mut text);
    if file == Path::new("-") {
        read(&mut io::stdin().lock())
    } else {
        read(&mut File::open(file).with_context(name)?)
    }
    .with_context(name)?;
    ensure!(
        text.len() as u64 <= MAX_BYTES,
        "{} is over 256 MiB: split it",
        file.display()
    );
    Ok(text)
}

fn reason(wanted: &Import, entry: &Entry) -> String {
    let said = wanted.reason.as_deref().or(entry.reason.as_deref());
    said.unwrap_or("imported").to_owned()
}

/// What is in a list: on standard error, for who wants to see the bans alone.
fn tell(file: &Path, list: &List, has_length: bool) {
    let name = if file == Path::new("-") {
        "standard input".into()
    } else {
        file.to_string_lossy()
    };
    for problem in &list.problems {
        eprintln!("{name}, {}: {}", problem.place, problem.what);
    }
    let more = list.misunderstood - list.problems.len();
    if more > 0 {
        eprintln!("{name}: {more} more that cannot be understood");
    }
    let entries = list.entries().len() as u64;
    let mut said = format!(
        "{name} ({}): {} read, {} not understood",
        list.format,
        plural(entries, "ban"),
        plural(list.misunderstood as u64, "line")
    );
    for (count, what) in [
        (list.over, "over"),
        (list.simulated, "only simulated"),
        (list.other, "no bans, or not of addresses"),
        (list.repeated, "named again"),
    ] {
        if count > 0 {
            let _ = write!(said, "; left out: {count} {what}");
        }
    }
    eprintln!("{said}");
    let endless = list.entries().filter(|entry| entry.term.is_none()).count();
    if endless > 0 && !has_length {
        eprintln!(
            "{name}: of {endless} it does not say how long: they are banned until they are lifted; --for gives them an end"
        );
    }
}

/// Who would be banned.
fn table(bans: &[Wanted]) -> String {
    let mut out = String::new();
    for ban in bans {
        let term = match ban.term {
            Term::Until(end) => format!("until {end}"),
            Term::Permanent => "until it is lifted".to_owned(),
        };
        let observed = if ban.observe { ", only observed" } else { "" };
        let _ = writeln!(out, "{}  {term}{observed}  {}", ban.subject, ban.reason);
    }
    let _ = writeln!(
        out,
        "{} would be asked for; nothing was done",
        plural(bans.len() as u64, "ban")
    );
    out
}

fn summary(all: &BannedMany) -> String {
    let mut out = format!(
        "{} banned, {} for as long already, {} refused",
        all.banned,
        all.stood,
        all.refused.len()
    );
    if all.over > 0 {
        let _ = write!(out, ", {} over meanwhile", all.over);
    }
    if !all.failed.is_empty() {
        let _ = write!(out, ", {} not in force yet", all.failed.len());
    }
    out.push('\n');
    name_some(&mut out, "refused", &all.refused);
    name_some(&mut out, "not in force yet, tried again", &all.failed);
    out
}

/// Some of each kind: of thousands that do not fit nobody wants to see all, but those on the allowlist must not drown in them.
fn name_some(out: &mut String, kind: &str, all: &[(Subject, String)]) {
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    let mut hidden = 0;
    for (subject, why) in all {
        let known = kinds
            .entry(why.replace(&subject.to_string(), ""))
            .or_default();
        *known += 1;
        if *known > SHOWN {
            hidden += 1;
        } else if why.contains(&subject.to_string()) {
            let _ = writeln!(out, "{kind}: {why}");
        } else {
            let _ = writeln!(out, "{kind}: {subject}: {why}");
        }
    }
    if hidden > 0 {
        let _ = writeln!(out, "{kind}: {hidden} more like these");
    }
}

/// Bans, in as many requests as they need.
fn requests(bans: Vec<Wanted>) -> Vec<Vec<Wanted>> {
    // With room for what is around them.
    const ROOM: u64 = control::MAX_REQUEST - 1024;
    let mut requests = Vec::new();
    let (mut request, mut size) = (Vec::new(), 0);
    for ban in bans {
        // What cannot be written would be refused anyway.
        let needs = serde_json::to_string(&ban).map_or(0, |text| text.len() as u64 + 1);
        if size + needs > ROOM && !request.is_empty() {
            requests.push(std::mem::take(&mut request));
            size = 0;
        }
        size += needs;
        request.push(ban);
    }
    if !request.is_empty() {
        requests.push(request);
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(subject: &str, reason: &str) -> Wanted {
        Wanted {
            subject: subject.parse().unwrap(),
            term: Term::Permanent,
            reason: reason.to_owned(),
            observe: false,
        }
    }

    #[test]
    fn every_ban_is_in_one_request_and_every_request_has_room() {
        let reason = "\"\u{10ffff}".repeat(100);
        let bans: Vec<Wanted> = (0..2000)
            .map(|n| wanted(&format!("10.0.{}.{}", n / 256, n % 256), &reason))
            .collect();
        let requests = requests(bans.clone());
        assert!(requests.len() > 10);
        for bans in &requests {
            let request = Request::BanMany { bans: bans.clone() };
            let text = serde_json::to_string(&request).unwrap();
            assert!((text.len() as u64) < control::MAX_REQUEST);
        }
        assert_eq!(requests.concat(), bans);
    }

    #[test]
    fn allowlisted_ones_do_not_drown_among_those_that_found_no_room() {
        let mut refused: Vec<(Subject, String)> = (0..100)
            .map(|n| (format!("10.0.0.{n}").parse().unwrap(), "full".to_owned()))
            .collect();
        let ours: Subject = "192.0.2.7".parse().unwrap();
        refused.push((ours, format!("{ours} is on the allowlist")));
        let said = summary(&BannedMany {
            banned: 3,
            refused,
            ..BannedMany::default()
        });
        assert!(
            said.starts_with(
                "3 banned, 0 for as long already, 101 refused\nrefused: 10.0.0.0: full\n"
            ),
            "{said}"
        );
        assert!(
            said.contains("refused: 192.0.2.7 is on the allowlist\n"),
            "{said}"
        );
        assert!(said.ends_with("refused: 80 more like these\n"), "{said}");
    }
}
