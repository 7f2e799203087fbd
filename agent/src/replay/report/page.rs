//! The page itself.

use std::{fmt::Write as _, time::Duration};

use portcullis_engine::{
    Event, Subject, Timestamp, command::Action, ledger::Term, time::format_duration,
};

use super::{
    Bar, HEAD, MAX_EVENTS, MAX_ROWS, Report, Traffic,
    svg::{RateAxis, TimeAxis, WIDTH, band, count, escaped, rate, steps},
};
use crate::replay::Summary;

const STYLE: &str = include_str!("style.css");
/// Names of logs that are listed.
const MAX_FILES: usize = 50;
/// Clients whose rates are plotted; the style has a colour for each.
const TOP: usize = 8;
/// Left of the plots, for labels.
const LEFT: f64 = 56.0;
/// Right of them, half a label sticks out.
const RIGHT: f64 = WIDTH - 22.0;

pub(super) fn page(report: &Report, summary: &Summary) -> String {
    let mut page = String::from(HEAD);
    let _ = write!(
        page,
        "<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>Portcullis: replay</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n"
    );
    heading(report, summary, &mut page);
    cards(summary, &mut page);
    if let Some(time) = time_axis(report, summary) {
        traffic(report, &time, &mut page);
        clients(report, &time, &mut page);
        bans(report, &time, &mut page);
    }
    decisions(report, &mut page);
    settings(report, &mut page);
    page.push_str(
        "<footer>Times are UTC. Nobody was banned: this is what the agent would have done with these lines. What those clients \
         would have done next had they been banned no log can say.</footer>\n</main></body></html>\n",
    );
    page
}

fn heading(report: &Report, summary: &Summary, page: &mut String) {
    page.push_str("<header><h1>What Portcullis would have done</h1>\n<p>");
    if let Some((first, last)) = summary.period {
        let length = format_duration(last.since(first));
        let _ = write!(
            page,
            "From {} to {} ({length}). ",
            moment(first),
            moment(last)
        );
    }
    let files = &report.facts.files;
    let names: Vec<String> = files
        .iter()
        .take(MAX_FILES)
        .map(|name| format!("<code>{}</code>", escaped(name)))
        .collect();
    let _ = write!(page, "Read: {}", names.join(", "));
    if files.len() > names.len() {
        let _ = write!(page, " and {} more", files.len() - names.len());
    }
    page.push_str(".</p></header>\n");
    for problem in &summary.problems {
        let _ = writeln!(page, "<p class=\"problem\">{}</p>", escaped(problem));
    }
}

/// To the second.
fn moment(at: Timestamp) -> String {
    let text = at.to_string();
    let (date, time) = (text.get(..10).unwrap_or(""), text.get(11..19).unwrap_or(""));
    format!("{date} {time}")
}

fn cards(summary: &Summary, page: &mut String) {
    let number = |number: u64| count(number as f64);
    let clients = number(summary.clients.count as u64);
    let clients = if summary.clients.is_exact {
        clients
    } else {
        format!("over {clients}")
    };
    let share = match summary.lines {
        0 => "0 %".to_owned(),
        lines => format!("{:.1} %", summary.from_banned as f64 / lines as f64 * 100.0),
    };
    let subjects = number(summary.banned.len() as u64);
    let over = if summary.more_banned { "over " } else { "" };
    let skipped = summary.malformed + summary.overlong + summary.out_of_time + summary.late;
    let cards = [
        (
            number(summary.lines),
            format!("requests, by {clients} clients"),
        ),
        (
            number(summary.bans),
            format!("bans, of {over}{subjects} clients"),
        ),
        (
            share,
            format!(
                "of all requests, by clients while they were banned ({})",
                number(summary.from_banned)
            ),
        ),
        (
            number(summary.alarms),
            "alarms for the whole site".to_owned(),
        ),
        (
            number(summary.refusals),
            "refusals: allowlisted, through a proxy, or no room".to_owned(),
        ),
        (
            number(skipped),
            format!(
                "lines left out: {} malformed, {} too long, {} out of time, {} too late",
                number(summary.malformed),
                number(summary.overlong),
                number(summary.out_of_time),
                number(summary.late)
            ),
        ),
    ];
    page.push_str("<section class=\"cards\">\n");
    for (figure, words) in cards {
        let _ = writeln!(page, "<div><b>{figure}</b><span>{words}</span></div>");
    }
    page.push_str("</section>\n");
}

fn time_axis(report: &Report, summary: &Summary) -> Option<TimeAxis> {
    let (_, last) = summary.period?;
    let (from, _) = report.traffic.iter().next()?;
    let to = (last.secs() + 1).max(from + report.traffic.width());
    Some(TimeAxis {
        from,
        to,
        left: LEFT,
        right: RIGHT,
    })
}

/// Opens a section with a plot of this height.
fn plot(title: &str, words: &str, height: f64, page: &mut String) {
    let _ = write!(
        page,
        "<section><h2>{title}</h2><p>{words}</p>\n\
         <svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">"
    );
}

fn key(class: &str, words: &str) -> String {
    format!("<span class=\"key {class}\">{words}</span>")
}

fn traffic(report: &Report, time: &TimeAxis, page: &mut String) {
    let width = report.traffic.width();
    let of = |requests: u64| requests as f64 / width as f64;
    let all: Vec<(u64, Traffic)> = report.traffic.iter().map(|(at, bin)| (at, *bin)).collect();
    let end = |bin: &Traffic| {
        bin.normal
            .map(|(mean, stddev)| mean + report.facts.z_score * stddev)
    };
    let highest = all
        .iter()
        .map(|(_, bin)| (bin.peak as f64).max(end(bin).unwrap_or(0.0)))
        .fold(0.0, f64::max);
    let mut usual: Vec<u64> = all.iter().map(|(_, bin)| bin.requests).collect();
    usual.sort_unstable();
    let usual = usual.get(usual.len() / 2).map_or(0.0, |middle| of(*middle));
    let rates = RateAxis::new(highest, usual, 26.0, 290.0);
    let words = format!(
        "{} {} {} {} {}",
        key("passed", "answered"),
        key("dropped", "of clients while they would have been banned"),
        key("peak", "busiest second"),
        key(
            "normal",
            &format!(
                "what was normal: mean ± {} standard deviations",
                report.facts.z_score
            )
        ),
        key("alarm", "alarm")
    );
    plot("Traffic", &words, 330.0, page);
    for (since, until) in &report.alarms {
        let (x, end) = (
            time.x(since.secs()),
            time.x(until.map_or(time.to, Timestamp::secs)),
        );
        let wide = (end - x).max(1.5);
        let _ = write!(
            page,
            "<rect class=\"alarm\" x=\"{x:.1}\" y=\"26\" width=\"{wide:.1}\" height=\"264\"><title>alarm since {}</title></rect>",
            moment(*since)
        );
    }
    time.draw(26.0, 290.0, page);
    rates.draw(time, page);
    let total = |bin: &Traffic| Some((0.0, of(bin.requests)));
    let passed = |bin: &Traffic| Some((0.0, of(bin.requests.saturating_sub(bin.banned))));
    let normal = |bin: &Traffic| {
        let (mean, stddev) = bin.normal?;
        let spread = report.facts.z_score * stddev;
        Some(((mean - spread).max(0.0), mean + spread))
    };
    let surface = |of: &dyn Fn(&Traffic) -> Option<(f64, f64)>| {
        band(
            all.iter().map(|(at, bin)| (*at, of(bin))),
            width,
            time,
            &rates,
        )
    };
    let line = |of: &dyn Fn(&Traffic) -> Option<f64>| {
        steps(
            all.iter().map(|(at, bin)| (*at, of(bin))),
            width,
            time,
            &rates,
        )
    };
    let _ = writeln!(
        page,
        "<path class=\"dropped\" d=\"{}\"/><path class=\"passed\" d=\"{}\"/><path class=\"normal\" d=\"{}\"/>\
         <path class=\"mean\" d=\"{}\"/><path class=\"peak\" d=\"{}\"/></svg></section>",
        surface(&total),
        surface(&passed),
        surface(&normal),
        line(&|bin| Some(bin.normal?.0)),
        line(&|bin| Some(bin.peak as f64)),
    );
}

fn clients(report: &Report, time: &TimeAxis, page: &mut String) {
    let width = report.traffic.width();
    let top = report.clients.top(TOP);
    if top.is_empty() {
        return;
    }
    let of = |requests: u64| requests as f64 / width as f64;
    let peaks: Vec<f64> = top.iter().map(|(_, client)| of(client.peak())).collect();
    let highest = peaks.iter().copied().fold(0.0, f64::max);
    let lowest = peaks.last().copied().unwrap_or(0.0);
    let rates = RateAxis::new(highest, lowest, 26.0, 270.0);
    let keys: Vec<String> = top
        .iter()
        .enumerate()
        .map(|(place, (subject, client))| {
            let words = format!(
                "{subject}: {} requests, up to {} a second",
                count(client.requests as f64),
                rate(of(client.peak()))
            );
            key(&format!("c{place}"), &escaped(&words))
        })
        .collect();
    let words = format!(
        "Those with the highest rates, averaged over {}.<br>{}",
        format_duration(Duration::from_secs(width)),
        keys.join(" ")
    );
    plot("Clients", &words, 310.0, page);
    time.draw(26.0, 270.0, page);
    rates.draw(time, page);
    // The heaviest last, on top of the others.
    for (place, (subject, client)) in top.iter().enumerate().rev() {
        let mut path = String::new();
        let mut pen: Option<u64> = None;
        for (bin, requests) in &client.bins {
            let (x, y) = (time.x(bin * width + width / 2), rates.y(of(*requests)));
            // Where nothing came, the line goes down to the ground.
            if pen.is_none_or(|last| last + 1 < *bin) {
                if let Some(last) = pen {
                    let _ = write!(
                        path,
                        "L{:.1} {:.1}",
                        time.x((last + 1) * width + width / 2),
                        rates.bottom
                    );
                }
                let before = (bin * width + width / 2).saturating_sub(width);
                let _ = write!(path, "M{:.1} {:.1}", time.x(before), rates.bottom);
            }
            let _ = write!(path, "L{x:.1} {y:.1}");
            pen = Some(*bin);
        }
        if let Some(last) = pen {
            let _ = write!(
                path,
                "L{:.1} {:.1}",
                time.x((last + 1) * width + width / 2),
                rates.bottom
            );
        }
        let _ = write!(
            page,
            "<path class=\"client c{place}\" d=\"{path}\"><title>{}</title></path>",
            escaped(&subject.to_string())
        );
    }
    page.push_str("</svg></section>\n");
}

fn bans(report: &Report, time: &TimeAxis, page: &mut String) {
    const ROW: f64 = 18.0;
    const TOP: f64 = 8.0;
    if report.rows.is_empty() {
        return;
    }
    let mut words = format!(
        "{} {} {} {} Those that end at the right edge stood when the logs ended.",
        key("t1", "first ban"),
        key("t2", "second"),
        key("t3", "third"),
        key("t4", "fourth and later")
    );
    if report.more_rows {
        let _ = write!(words, " Only the first {MAX_ROWS} clients are shown.");
    }
    let bottom = TOP + ROW * report.rows.len() as f64;
    plot("Bans", &words, bottom + 40.0, page);
    let longest = report.rows.keys().map(|subject| subject.to_string().len());
    let label = 7.0 * longest.max().unwrap_or(0) as f64;
    let time = TimeAxis {
        left: LEFT.max(label + 10.0),
        ..*time
    };
    let label_x = time.left - 8.0;
    time.draw(TOP, bottom, page);
    for (place, (subject, bars)) in report.rows.iter().enumerate() {
        let y = TOP + ROW * place as f64;
        let text_y = y + 13.0;
        let _ = write!(
            page,
            "<text class=\"end code\" x=\"{label_x}\" y=\"{text_y}\">{}</text>",
            escaped(&subject.to_string())
        );
        for bar in bars {
            draw_bar(*subject, bar, y + 3.0, &time, page);
        }
    }
    page.push_str("</svg></section>\n");
}

fn draw_bar(subject: Subject, bar: &Bar, y: f64, time: &TimeAxis, page: &mut String) {
    let (x, end) = (
        time.x(bar.since.secs()),
        time.x(bar.until.map_or(time.to, Timestamp::secs)),
    );
    // A bar ends where the next may begin.
    let wide = (end - x).max(2.0);
    let tier = bar.tier.clamp(1, 4);
    let length = match bar.term {
        Some(Term::Until(end)) => format!("for {}", format_duration(end.since(bar.since))),
        _ => "permanently".to_owned(),
    };
    let words = format!(
        "{subject}, {} {length}, tier {}: {}",
        moment(bar.since),
        bar.tier,
        bar.reason
    );
    let _ = write!(
        page,
        "<rect class=\"bar t{tier}\" x=\"{x:.1}\" y=\"{y}\" width=\"{wide:.1}\" height=\"12\" rx=\"1.5\"><title>{}</title></rect>",
        escaped(&words)
    );
}

fn decisions(report: &Report, page: &mut String) {
    page.push_str("<section><h2>Decisions</h2>\n");
    if report.events.is_empty() {
        page.push_str("<p>None: nobody left the normal traffic.</p></section>\n");
        return;
    }
    if report.decisions > report.events.len() as u64 {
        let _ = writeln!(
            page,
            "<p>The first {MAX_EVENTS} of {}; <code>portcullis replay --json</code> prints all.</p>",
            count(report.decisions as f64)
        );
    }
    page.push_str(
        "<div class=\"wide\"><table><thead><tr><th>Time (UTC)</th><th>Decision</th><th>Whom</th><th>Why</th>\
         <th class=\"n\">Rate, req/s</th><th class=\"n\">Mean, req/s</th><th class=\"n\">Deviation, req/s</th><th class=\"n\">z</th>\
         <th>For</th></tr></thead><tbody>\n",
    );
    for event in &report.events {
        decision(event, page);
    }
    page.push_str("</tbody></table></div></section>\n");
}

fn decision(event: &Event, page: &mut String) {
    let (class, words) = match (event.action, event.tier) {
        (Action::Ban, Some(tier)) => (
            format!("t{}", tier.clamp(1, 4)),
            format!("ban, tier {tier}"),
        ),
        (Action::Ban, None) => ("t1".to_owned(), "ban".to_owned()),
        (Action::Refuse, _) => ("none".to_owned(), "no ban".to_owned()),
        (Action::Alarm, _) => ("alarm".to_owned(), "alarm".to_owned()),
        (action, _) => ("none".to_owned(), action.name().to_lowercase()),
    };
    let whom = match (event.subject, event.action) {
        (Some(subject), _) => subject.to_string(),
        (None, Action::Alarm) => "site".to_owned(),
        (None, _) => String::new(),
    };
    let figures = event.finding.as_ref().map(|finding| {
        [
            format!("{:.2}", finding.rate),
            format!("{:.2}", finding.mean),
            format!("{:.2}", finding.stddev),
            format!("{:.1}", finding.score),
        ]
    });
    let figures = figures.unwrap_or_default();
    let length = match (event.duration(), event.term) {
        (Some(length), _) => format_duration(length),
        (None, Some(Term::Permanent)) => "good".to_owned(),
        (None, _) => String::new(),
    };
    let _ = write!(
        page,
        "<tr><td>{}</td><td>{}</td><td><code>{}</code></td><td>{}</td>",
        moment(event.time),
        key(&class, &escaped(&words)),
        escaped(&whom),
        escaped(&event.condition)
    );
    for figure in figures {
        let _ = write!(page, "<td class=\"n\">{figure}</td>");
    }
    let _ = writeln!(page, "<td>{length}</td></tr>");
}

fn settings(report: &Report, page: &mut String) {
    page.push_str("<section><h2>Settings</h2>\n");
    if report.facts.differing.is_empty() {
        page.push_str("<p>All as they are by default.</p></section>\n");
        return;
    }
    page.push_str(
        "<p>Those that are not what they are by default.</p><div class=\"wide\"><table><tbody>\n",
    );
    for (key, value) in &report.facts.differing {
        let _ = writeln!(
            page,
            "<tr><td><code>{}</code></td><td><code>{}</code></td></tr>",
            escaped(key),
            escaped(value)
        );
    }
    page.push_str("</tbody></table></div></section>\n");
}
