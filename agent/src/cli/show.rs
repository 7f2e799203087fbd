//! Answers as a person reads them.

use std::{fmt::Write as _, time::Duration};

use portcullis_engine::{Origin, Subject, Term, baseline::Learnt, time::format_duration};

use crate::{
    enforce::Mode,
    runtime::{AllowRow, BanRow, Banned, Explained, Reloaded, Status},
};

/// What has come of a ban by hand.
pub(super) fn banned(subject: Subject, banned: &Banned) -> String {
    let term = match banned.term {
        Term::Until(end) => format!("until {end}"),
        Term::Permanent => "until it is lifted".to_owned(),
    };
    let observed = if banned.observed {
        " (only observed: its packets are counted, not dropped)"
    } else {
        ""
    };
    let mut out = format!("{subject} is banned {term}{observed}\n");
    if !banned.spared.is_empty() {
        let spared: Vec<String> = banned.spared.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "on the allowlist, and so not: {}", spared.join(", "));
    }
    out
}

/// Who is never banned.
pub(super) fn allowlist(rows: &[AllowRow]) -> String {
    let mut out = String::new();
    for row in rows {
        let net = Subject::of_net(row.net);
        let who = match (row.since, &row.by) {
            (Some(since), Some(by)) => format!(" ({by}, {since})"),
            _ => String::new(),
        };
        let _ = writeln!(out, "{:<24}{}{who}", net.to_string(), row.why);
    }
    out
}

/// What has become of the configuration.
pub(super) fn reloaded(reloaded: &Reloaded) -> String {
    let mut out = String::new();
    for change in &reloaded.changed {
        let _ = writeln!(out, "{change}");
    }
    if reloaded.changed.is_empty() {
        out.push_str("nothing has changed\n");
    }
    for change in &reloaded.needs_restart {
        let _ = writeln!(out, "only after a restart: {change}");
    }
    out
}

/// Whether somebody can be banned.
pub(super) fn spared(subject: Subject, explained: &Explained) -> String {
    match &explained.known.spared {
        Some(spared) if spared.is_whole => {
            format!(
                "{subject} is never banned: {} is on the allowlist\n",
                Subject::of_net(spared.entry)
            )
        }
        Some(spared) => format!(
            "a part of {subject} is never banned ({}), so the detector does not ban all of it; an operator can, and that part is spared\n",
            Subject::of_net(spared.entry)
        ),
        None => format!("{subject} can be banned\n"),
    }
}

/// So many logs that cannot be read are named.
const UNREADABLE: usize = 5;

/// One screen.
#[expect(
    clippy::too_many_lines,
    reason = "one line of the screen after the other"
)]
pub(super) fn status(s: &Status) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(out, "{name:<10}{text}");
    };
    let mode = match s.mode {
        Mode::Observe => "observe: banned sources are counted, nothing is dropped",
        Mode::Enforce => "enforce: packets of banned sources are dropped",
    };
    line("mode", mode.to_owned());
    line("back end", format!("{} on {}", s.backend, s.place));
    for refused in &s.refused {
        line("", format!("not {refused}"));
    }
    let normal = &s.engine.normal;
    let learnt = match normal.learnt {
        Learnt::WarmUp => format!(
            "warming up, {} s seen; absolute ceilings hold",
            normal.seconds
        ),
        Learnt::Recent => format!(
            "the last {}",
            format_duration(Duration::from_secs(normal.seconds.into()))
        ),
        Learnt::Hour(hour) => format!(
            "hour {hour} UTC, {} of it",
            format_duration(Duration::from_secs(normal.seconds.into()))
        ),
    };
    line(
        "baseline",
        format!(
            "mean {:.2} req/s, stddev {:.2}, errors {:.1} % ({learnt})",
            normal.mean,
            normal.stddev,
            normal.error_share * 100.0
        ),
    );
    line(
        "now",
        format!(
            "{:.2} req/s, z {:.1}, {} clients in the window",
            s.engine.rate, s.engine.score, s.engine.clients
        ),
    );
    if let Some(since) = s.engine.alarm_since {
        line(
            "ALARM",
            format!("all traffic together is out of the normal since {since}"),
        );
    }
    if let Some(since) = s.engine.held_since {
        line(
            "HOLD",
            format!(
                "more bans than may be made: only the worst are, since {since}; see bans.max_per_minute and bans.max_regulars"
            ),
        );
    }
    if !s.needs_restart.is_empty() {
        line(
            "restart",
            format!(
                "the configuration says otherwise, after a restart: {}",
                s.needs_restart.join(", ")
            ),
        );
    }
    if !s.names_without_address.is_empty() {
        line(
            "allow",
            format!(
                "no address for {}: nobody is spared for that; see bans.allow, or the name servers",
                s.names_without_address.join(", ")
            ),
        );
    }
    let tiers: Vec<String> = s
        .bans_by_tier
        .iter()
        .map(|(tier, bans)| {
            if *tier == 0 {
                format!("by operators {bans}")
            } else {
                format!("tier {tier}: {bans}")
            }
        })
        .collect();
    let tiers = if tiers.is_empty() {
        String::new()
    } else {
        format!(" ({})", tiers.join(", "))
    };
    line("bans", format!("{}{tiers}", s.engine.bans));
    let packets: Vec<String> = s
        .counters
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    line(
        "packets",
        if packets.is_empty() {
            "none counted yet".to_owned()
        } else {
            packets.join(", ")
        },
    );
    if s.ended_connections > 0 {
        line(
            "ended",
            format!("{} connections of banned sources", s.ended_connections),
        );
    }
    let totals = &s.engine.totals;
    let source = &s.source;
    line(
        "log",
        format!(
            "{} lines of {}, {} malformed, {} late, {} overlong",
            totals.lines,
            count(source.logs, "log"),
            totals.malformed,
            totals.late,
            source.overlong_lines,
        ),
    );
    for unreadable in s.unreadable.iter().take(UNREADABLE) {
        line("ERROR", unreadable.to_string());
    }
    if s.unreadable.len() > UNREADABLE {
        let more = (s.unreadable.len() - UNREADABLE) as u64;
        line(
            "ERROR",
            format!("{} more cannot be read", count(more, "log")),
        );
    }
    if source.lag_secs > 0 || source.one_in > 1 {
        let sample = if source.one_in > 1 {
            format!("; of {} lines one is read", source.one_in)
        } else {
            String::new()
        };
        line(
            "BEHIND",
            format!(
                "{} s, {} bytes are not read yet{sample}",
                source.lag_secs, source.lag_bytes
            ),
        );
    }
    if source.syslog > 0 || source.syslog_lost > 0 {
        line(
            "syslog",
            format!(
                "{} messages, {} lost for want of room",
                source.syslog, source.syslog_lost
            ),
        );
    }
    if totals.proxied > 0 {
        line(
            "proxied",
            format!("{} requests came through a proxy", totals.proxied),
        );
    }
    if let Some(nginx) = &s.nginx {
        line(
            "nginx",
            format!(
                "{} refused by it, {} changes waiting, {} reloads",
                count(nginx.entries as u64, "source"),
                nginx.pending,
                nginx.reloads
            ),
        );
        if let Some(error) = &nginx.error {
            line("ERROR", error.clone());
        }
    }
    if s.latency.bans > 0 {
        let latency = &s.latency;
        line(
            "latency",
            format!(
                "line read to ban in force: median {:.2} ms, p99 {:.2} ms, max {:.2} ms over {} bans",
                latency.median_ms, latency.p99_ms, latency.max_ms, latency.bans
            ),
        );
    }
    if !s.drift.is_none() {
        line("drift", format!("repaired: {}", s.drift));
    }
    if let Some(error) = &s.enforce_error {
        line("ERROR", error.clone());
    }
    if s.enforce_aside > 0 {
        line(
            "WAITING",
            format!("{} changes for the back end", s.enforce_aside),
        );
    }
    if let Some(error) = &s.store_error {
        line(
            "ERROR",
            format!(
                "{} changes of the ledger are not on disk, and would not survive a restart: {error}",
                s.store_pending
            ),
        );
    }
    if let Some(error) = &s.history_error {
        line("ERROR", format!("nothing is put on record now: {error}"));
    }
    if s.enforce_overtaken > 0 || s.history_lost > 0 {
        line(
            "LOST",
            format!(
                "{} events of the history",
                s.enforce_overtaken + s.history_lost
            ),
        );
    }
    for (name, told) in [("slack", &s.slack), ("webhook", &s.webhook)] {
        if told.configured {
            let error = told.last_error.as_ref();
            let error = error.map_or_else(String::new, |error| format!("; {error}"));
            line(
                name,
                format!(
                    "{} sent, {} waiting, {} failed, {} dropped{error}",
                    told.sent, told.queued, told.failed, told.dropped
                ),
            );
        }
    }
    line(
        "running",
        format!(
            "{} (version {})",
            format_duration(Duration::from_secs(s.uptime_secs)),
            s.version
        ),
    );
    out
}

fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {what}{plural}")
}

/// Whom a person wants to see first.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum Order {
    /// The newest
    Since,
    /// Whose ban ends soonest, permanent ones last
    Until,
    /// Who has sent most packets
    Hits,
    /// Whose last packet is newest
    LastSeen,
    /// Who is furthest in the schedule, operators' bans last
    Tier,
    /// The lowest address
    Subject,
}

impl Order {
    /// Sorts, and what is equal as the agent has it: newest first.
    pub(super) fn sort(self, bans: &mut [BanRow]) {
        use std::cmp::Reverse;

        match self {
            // So the agent sends them.
            Self::Since => {}
            Self::Until => bans.sort_by_key(|row| match row.ban.term {
                Term::Until(end) => (false, Some(end)),
                Term::Permanent => (true, None),
            }),
            Self::Hits => bans.sort_by_key(|row| Reverse(row.hits)),
            Self::LastSeen => {
                bans.sort_by_key(|row| (row.last_seen_secs.is_none(), row.last_seen_secs));
            }
            Self::Tier => bans.sort_by_key(|row| Reverse(row.ban.tier)),
            Self::Subject => bans.sort_by_key(|row| row.ban.subject),
        }
    }
}

/// A table.
pub(super) fn bans(bans: &[BanRow]) -> String {
    if bans.is_empty() {
        return "no bans\n".to_owned();
    }
    let header = ["SUBJECT", "LEFT", "TIER", "PACKETS", "LAST SEEN", "REASON"].map(str::to_owned);
    let rows = bans.iter().map(|row| {
        let tier = match (row.ban.origin, row.ban.tier) {
            (Origin::Operator, _) if row.ban.observe => "operator, observed".to_owned(),
            (Origin::Operator, _) => "operator".to_owned(),
            (Origin::Detector, tier) => {
                tier.map_or_else(|| "-".to_owned(), |tier| tier.to_string())
            }
        };
        [
            row.ban.subject.to_string(),
            row.remaining_secs.map_or_else(
                || "permanent".to_owned(),
                |secs| format_duration(Duration::from_secs(secs)),
            ),
            tier,
            match row.hits {
                Some(hits) => hits.to_string(),
                None if row.ban.gate.has_wire() => "not in force".to_owned(),
                None => "in Nginx".to_owned(),
            },
            row.last_seen_secs.map_or_else(
                || "-".to_owned(),
                |secs| format!("{} ago", format_duration(Duration::from_secs(secs))),
            ),
            // An operator's words may hold anything; a terminal must not be told what to do by them.
            row.ban
                .reason
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect(),
        ]
    });
    let table: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| {
        table
            .iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths = [0, 1, 2, 3, 4].map(width);
    let mut out = String::new();
    for row in &table {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(out, "{cell:<width$}  ");
        }
        let _ = writeln!(out, "{}", row[5]);
    }
    out
}

#[cfg(test)]
mod tests {
    use portcullis_engine::{Ban, Timestamp};

    use super::*;
    use crate::runtime::Unreadable;

    #[test]
    fn bans_are_sorted_as_they_are_asked_for() {
        let row = |subject: &str, end: Option<u64>, tier, hits, last_seen_secs| BanRow {
            ban: Ban {
                tier,
                ..Ban::new(
                    subject.parse().unwrap(),
                    Timestamp::from_secs(1),
                    end.map_or(Term::Permanent, |end| {
                        Term::Until(Timestamp::from_secs(end))
                    }),
                    tier.map_or(Origin::Operator, |_| Origin::Detector),
                )
            },
            hits,
            last_seen_secs,
            remaining_secs: end,
        };
        let rows = [
            row("192.0.2.3", None, None, Some(5), Some(9)),
            row("192.0.2.10", Some(20), Some(2), None, None),
            row("2001:db8::/64", Some(10), Some(1), Some(7), Some(100)),
        ];
        for (order, expected) in [
            (Order::Since, ["192.0.2.3", "192.0.2.10", "2001:db8::/64"]),
            (Order::Until, ["2001:db8::/64", "192.0.2.10", "192.0.2.3"]),
            (Order::Hits, ["2001:db8::/64", "192.0.2.3", "192.0.2.10"]),
            (
                Order::LastSeen,
                ["192.0.2.3", "2001:db8::/64", "192.0.2.10"],
            ),
            (Order::Tier, ["192.0.2.10", "2001:db8::/64", "192.0.2.3"]),
            (Order::Subject, ["192.0.2.3", "192.0.2.10", "2001:db8::/64"]),
        ] {
            let mut rows = rows.to_vec();
            order.sort(&mut rows);
            let sorted: Vec<String> = rows.iter().map(|row| row.ban.subject.to_string()).collect();
            assert_eq!(sorted, expected, "{order:?}");
        }
    }

    #[test]
    fn logs_that_cannot_be_read_stand_out_and_do_not_fill_the_screen() {
        let mut shown = Status::sample();
        assert!(!status(&shown).contains("ERROR"));
        let unreadable = |log: u64| Unreadable {
            log: format!("/{log}.json"),
            lines: 20 + log,
            first: Some(7),
            problem: "no JSON".to_owned(),
        };
        shown.unreadable = (1..=7).map(unreadable).collect();
        let screen = status(&shown);
        assert!(
            screen.contains(
                "ERROR     none of the newest 21 lines of /1.json can be read; the first of them, at byte 7, is no JSON; \
                 `portcullis lines /1.json` shows more\n"
            ),
            "{screen}"
        );
        assert!(!screen.contains("/6.json"), "{screen}");
        assert!(
            screen.contains("ERROR     2 logs more cannot be read\n"),
            "{screen}"
        );
    }
}
