//! The pace of delivery, tried on a clock that jumps to the next thing that happens: an hour's outage takes no time.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use portcullis_engine::command::Action;
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, sleep_until},
};

use super::{
    Limits, Outbox,
    delivery::{Courier, Failure, Post, Receiver, Tempo},
    sink::Log,
    slack::{Links, Slack},
    tests::{finish, told},
    webhook::{MOST, Webhook},
};
use crate::enforce::Mode;

const HOST: &str = "edge-1";

const LIMITS: Limits = Limits {
    min_interval: SECOND,
    queue: 256,
    timeout: Duration::from_secs(5),
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);

fn slack() -> Slack {
    Slack::new(HOST, Links::default(), SECOND)
}

fn webhook() -> Webhook {
    Webhook {
        host: HOST.to_owned(),
    }
}

/// What an attempt gets for an answer, by the time since the start and the number of attempts before.
type Answer = Box<dyn Fn(Duration, usize) -> Result<(), Failure> + Send + Sync>;

/// A receiver without a network, which answers in no time.
#[derive(Clone)]
struct Stand {
    start: Instant,
    answer: Arc<Answer>,
    attempts: Arc<Mutex<Vec<Attempt>>>,
}

#[derive(Clone, Debug)]
struct Attempt {
    at: Duration,
    body: Value,
    is_taken: bool,
}

impl Post for Stand {
    async fn post(&self, body: &Value) -> Result<(), Failure> {
        let at = self.start.elapsed();
        let mut attempts = self.attempts.lock().unwrap();
        let result = (self.answer)(at, attempts.len());
        attempts.push(Attempt {
            at,
            body: body.clone(),
            is_taken: result.is_ok(),
        });
        result
    }
}

/// A courier to such a receiver, and what came of it.
struct Scene {
    start: Instant,
    stand: Stand,
    outbox: Outbox,
    task: JoinHandle<()>,
    told: u64,
}

impl Scene {
    fn new<R: Receiver>(
        receiver: R,
        answer: impl Fn(Duration, usize) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        let start = Instant::now();
        let stand = Stand {
            start,
            answer: Arc::new(Box::new(answer)),
            attempts: Arc::default(),
        };
        let (outbox, task) = Courier::new(receiver, stand.clone(), LIMITS).start(&Tempo::REAL);
        Self {
            start,
            stand,
            outbox,
            task,
            told: 0,
        }
    }

    fn tell(&mut self, action: Action, subject: Option<&str>) {
        self.told += 1;
        self.outbox
            .tell(&told(action, subject).event, Mode::Enforce);
    }

    fn tell_of_many(&mut self, action: Action, count: u32) {
        for n in 0..count {
            let [_, a, b, c] = n.to_be_bytes();
            self.tell(action, Some(&format!("10.{a}.{b}.{c}")));
        }
    }

    /// Lets time pass until so long after the start.
    async fn until(&self, time: Duration) {
        sleep_until(self.start + time).await;
    }

    async fn until_told(&self) {
        while self.outbox.status().queued > 0 {
            sleep(SECOND).await;
        }
    }

    fn attempts(&self) -> Vec<Attempt> {
        self.stand.attempts.lock().unwrap().clone()
    }

    fn taken(&self) -> Vec<Attempt> {
        let mut attempts = self.attempts();
        attempts.retain(|attempt| attempt.is_taken);
        attempts
    }

    /// Headlines of Slack's messages, by the second.
    fn headlines(&self) -> Vec<(u64, String)> {
        let headline = |attempt: &Attempt| {
            let header = attempt.body["blocks"][0]["text"]["text"].as_str().unwrap();
            let header = header.strip_suffix(" · edge-1").unwrap();
            (attempt.at.as_secs(), header.to_owned())
        };
        self.taken().iter().map(headline).collect()
    }

    async fn finish(self) -> super::Status {
        finish(self.outbox, self.task, self.told).await
    }
}

fn headlines(expected: &[(u64, &str)]) -> Vec<(u64, String)> {
    let owned = expected.iter().map(|(at, text)| (*at, (*text).to_owned()));
    owned.collect()
}

/// Every event in these requests, and how many are said to be missing.
fn events(taken: &[Attempt]) -> (Vec<Value>, u64) {
    let of = |attempt: &Attempt| attempt.body["events"].as_array().unwrap().clone();
    let left_out = |attempt: &Attempt| attempt.body["left_out"].as_u64().unwrap_or(0);
    (
        taken.iter().flat_map(of).collect(),
        taken.iter().map(left_out).sum(),
    )
}

/// Alarms and their ends, in the order in which they came, whichever kind the messages are of.
fn site_news(taken: &[Attempt]) -> String {
    let mut news = String::new();
    for attempt in taken {
        let text = attempt.body.to_string();
        for (place, _) in text.match_indices('"') {
            let rest = &text[place + 1..];
            if rest.starts_with("🔴 The site's") || rest.starts_with("alarm\"") {
                news.push('A');
            } else if rest.starts_with("🟢 Resolved: the site's") || rest.starts_with("all_clear\"")
            {
                news.push('C');
            }
        }
    }
    news
}

/// An hour in which nobody answers, with news of the site every minute and bans every second. Returns the scene once all is told.
async fn an_hour_s_outage<R: Receiver>(receiver: R) -> Scene {
    let mut scene = Scene::new(receiver, |at, _| {
        if at < HOUR {
            Err(Failure::Unreached("connection refused".to_owned()))
        } else {
            Ok(())
        }
    });
    for minute in 0..60_u64 {
        let action = if minute.is_multiple_of(2) {
            Action::Alarm
        } else {
            Action::AllClear
        };
        scene.tell(action, None);
        for second in 0..60 {
            scene.until(Duration::from_secs(minute * 60 + second)).await;
            scene.tell_of_many(Action::Ban, 5);
        }
    }
    let status = scene.outbox.status();
    assert_eq!((status.sent, status.failed), (0, 0), "{status:?}");
    assert!(status.queued <= 256 + MOST as u64, "{status:?}");
    assert_eq!(status.queued + status.dropped, scene.told);
    assert_eq!(status.last_error.as_deref(), Some("connection refused"));
    let tries = scene.attempts().len();
    assert!((60..70).contains(&tries), "{tries} attempts in the hour");

    scene.until(HOUR).await;
    let lost = status.dropped;
    scene.until_told().await;
    let status = scene.outbox.status();
    assert_eq!((status.failed, status.dropped), (0, lost), "{status:?}");
    assert_eq!(status.last_error, None);
    let taken = scene.taken();
    let first = taken[0].at;
    assert!(first <= HOUR + Duration::from_mins(1), "{first:?}");
    assert_eq!(site_news(&taken), "AC".repeat(30), "in order, none missing");
    scene
}

#[tokio::test(start_paused = true)]
async fn an_hour_s_outage_costs_slack_no_news_of_the_site_and_no_count() {
    let (log, _guard) = Log::start();
    let scene = an_hour_s_outage(slack()).await;
    scene.until(2 * HOUR).await;
    let bans = "🟠 18000 bans".to_owned();
    assert!(
        scene
            .headlines()
            .iter()
            .any(|(_, headline)| *headline == bans)
    );
    scene.finish().await;
    let log = log.text();
    assert_eq!(log.matches("cannot be told now").count(), 1, "{log}");
    assert_eq!(log.matches("can be told again").count(), 1, "{log}");
}

#[tokio::test(start_paused = true)]
async fn an_hour_s_outage_costs_the_webhook_what_the_bound_says() {
    let scene = an_hour_s_outage(webhook()).await;
    let (events, left_out) = events(&scene.taken());
    assert_eq!(events.len() as u64 + left_out, scene.told);
    let status = scene.finish().await;
    assert_eq!(status.dropped, left_out);
    assert_eq!(status.sent, events.len() as u64);
}

/// A flood of bans and their end, as `import` and `unban --all` make it, with an alarm in the middle of each.
async fn everybody_at_once<R: Receiver>(receiver: R) -> Scene {
    let mut scene = Scene::new(receiver, |_, _| Ok(()));
    for (action, news) in [
        (Action::Ban, Action::Alarm),
        (Action::Unban, Action::AllClear),
    ] {
        scene.tell_of_many(action, 50_000);
        scene.tell(news, None);
        scene.tell_of_many(action, 50_000);
        let from = scene.start.elapsed();
        scene.until(from + 5 * SECOND).await;
        scene.tell_of_many(action, 100);
        scene.until(from + 20 * SECOND).await;
    }
    assert_eq!(site_news(&scene.taken()), "AC");
    for (news, after) in ["A", "AC"].into_iter().zip([0, 20]) {
        let mut taken = scene.taken();
        taken.retain(|attempt| attempt.at <= Duration::from_secs(after + 3));
        assert_eq!(site_news(&taken), news, "not told within three seconds");
    }
    scene
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_bans_and_their_end_are_a_few_messages_and_hide_no_alarm() {
    let scene = everybody_at_once(slack()).await;
    scene.until(10 * HOUR).await;
    assert_eq!(
        scene.headlines(),
        headlines(&[
            (0, "🔴 The site's traffic is not normal"),
            (1, "🟠 100000 bans"),
            (11, "🟠 100100 bans so far"),
            (20, "🟢 Resolved: the site's traffic is normal again"),
            (41, "🟢 100100 bans, 100100 unbans so far"),
            (
                101,
                "🟢 Resolved: calm again after 100100 bans, 100100 unbans"
            ),
        ])
    );
    assert_eq!(scene.finish().await.failed, 0);
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_bans_and_their_end_cost_the_webhook_what_the_bound_says() {
    let scene = everybody_at_once(webhook()).await;
    let taken = scene.taken();
    assert!(
        taken
            .iter()
            .all(|attempt| attempt.body["events"].as_array().unwrap().len() <= MOST),
        "a request is too long"
    );
    let (events, left_out) = events(&taken);
    assert_eq!(events.len() as u64 + left_out, scene.told);
    let status = scene.finish().await;
    assert_eq!((status.dropped, status.failed), (left_out, 0), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_told_ever_more_rarely_and_its_end_is_told() {
    let mut scene = Scene::new(slack(), |_, _| Ok(()));
    for second in 0..200 {
        scene.until(Duration::from_secs(second)).await;
        scene.tell(Action::Ban, Some(&format!("192.0.2.{second}")));
    }
    scene.until(HOUR).await;
    let first = "🟠 Banned 192.0.2.0";
    assert_eq!(
        scene.headlines(),
        headlines(&[
            (0, first),
            (1, "🟠 Banned 192.0.2.1"),
            (11, "🟠 12 bans so far"),
            (41, "🟠 42 bans so far"),
            (101, "🟠 102 bans so far"),
            (161, "🟠 162 bans so far"),
            (221, "🟠 200 bans so far"),
            (281, "🟢 Resolved: calm again after 200 bans"),
        ])
    );
    // The next one is news again.
    scene.tell(Action::Ban, Some("192.0.2.0"));
    scene.until(HOUR + SECOND).await;
    assert_eq!(scene.headlines().pop(), Some((3600, first.to_owned())));
    assert_eq!(scene.finish().await.sent, 201);
}

#[tokio::test(start_paused = true)]
async fn bans_now_and_then_are_no_flood() {
    let mut scene = Scene::new(slack(), |_, _| Ok(()));
    for n in 0..10 {
        scene.until(Duration::from_secs(11 * n)).await;
        scene.tell(Action::Ban, Some(&format!("192.0.2.{n}")));
    }
    scene.until(HOUR).await;
    let headlines = scene.headlines();
    assert_eq!(headlines.len(), 10, "{headlines:?}");
    for (n, (at, headline)) in (0..).zip(headlines) {
        assert_eq!((at, headline), (11 * n, format!("🟠 Banned 192.0.2.{n}")));
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_one_message() {
    let mut scene = Scene::new(slack(), |_, _| Ok(()));
    scene.tell_of_many(Action::Ban, 50);
    scene.until(HOUR).await;
    assert_eq!(scene.headlines(), headlines(&[(0, "🟠 50 bans")]));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_stops_in_a_flood_tells_what_it_knows_and_not_that_all_is_calm() {
    let mut scene = Scene::new(slack(), |_, _| Ok(()));
    scene.tell_of_many(Action::Ban, 50);
    scene.until(SECOND).await;
    scene.tell_of_many(Action::Ban, 5);
    scene.until(15 * SECOND).await;
    scene.tell_of_many(Action::Ban, 6);
    scene.tell(Action::Stop, None);
    scene.until(20 * SECOND).await;
    let stand = scene.stand.clone();
    scene.finish().await;
    let last = stand.attempts.lock().unwrap().pop().unwrap();
    let header = last.body["blocks"][0]["text"]["text"].as_str().unwrap();
    assert_eq!(header, "🟠 61 bans so far · edge-1");
}

/// Every third attempt is turned away.
async fn a_second_apart<R: Receiver>(receiver: R) {
    let mut scene = Scene::new(receiver, |_, number| match number % 3 {
        2 => Err(Failure::Busy("answer 429".to_owned(), Some(Duration::ZERO))),
        _ => Ok(()),
    });
    for step in 0..500 {
        // Uneven, and the same in each run.
        scene.until(Duration::from_millis(step * 370)).await;
        match step % 7 {
            0 => scene.tell(Action::Alarm, None),
            3 => scene.tell(Action::AllClear, None),
            _ => scene.tell_of_many(Action::Ban, 3),
        }
    }
    scene.until_told().await;
    let attempts = scene.attempts();
    for pair in attempts.windows(2) {
        assert!(pair[1].at >= pair[0].at + SECOND, "{pair:#?}");
        assert!(
            pair[0].is_taken || pair[0].body == pair[1].body,
            "{pair:#?}"
        );
    }
    assert_eq!(site_news(&scene.taken()), "AC".repeat(72)[..143]);
    scene.finish().await;
}

#[tokio::test(start_paused = true)]
async fn requests_are_a_second_apart_and_in_order_whatever_happens() {
    a_second_apart(slack()).await;
    a_second_apart(webhook()).await;
}

/// When the attempts are, if the first of them gets this answer.
async fn attempts_after<R: Receiver>(receiver: R, failure: Failure) -> Vec<u64> {
    let mut scene = Scene::new(receiver, move |_, number| match number {
        0 => Err(failure.clone()),
        _ => Ok(()),
    });
    scene.tell(Action::Alarm, None);
    scene.until_told().await;
    let at = scene
        .attempts()
        .iter()
        .map(|attempt| attempt.at.as_secs())
        .collect();
    scene.finish().await;
    at
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_is_asked_for_is_kept_to_the_second_and_five_minutes_at_most() {
    let busy = |asked: Option<u64>| {
        let asked = asked.map(Duration::from_secs);
        Failure::Busy("answer 429".to_owned(), asked)
    };
    for (asked, second) in [
        (None, 1),
        (Some(0), 1),
        (Some(30), 30),
        (Some(300), 300),
        (Some(301), 300),
        (Some(u64::MAX), 300),
    ] {
        assert_eq!(attempts_after(slack(), busy(asked)).await, [0, second]);
        assert_eq!(attempts_after(webhook(), busy(asked)).await, [0, second]);
    }
    let unreached = Failure::Unreached("no answer".to_owned());
    assert_eq!(attempts_after(slack(), unreached).await, [0, 1]);
}

async fn broken_for_long<R: Receiver>(receiver: R) {
    let mut scene = Scene::new(receiver, |at, _| {
        if at < HOUR + Duration::from_mins(2) {
            Err(Failure::Busy("answer 500".to_owned(), None))
        } else {
            Ok(())
        }
    });
    scene.tell(Action::Alarm, None);
    scene.until(SECOND).await;
    scene.tell(Action::AllClear, None);
    scene.until_told().await;
    let attempts = scene.attempts();
    let first: Vec<u64> = attempts
        .iter()
        .map(|attempt| attempt.at.as_secs())
        .take(9)
        .collect();
    assert_eq!(first, [0, 1, 3, 7, 15, 31, 63, 123, 183]);
    // An hour is over with the first of them; the other still has its own.
    assert_eq!(site_news(&scene.taken()), "C");
    let status = scene.finish().await;
    assert_eq!((status.sent, status.failed), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn who_answers_and_takes_nothing_is_given_an_hour_for_each_request() {
    let (log, _guard) = Log::start();
    broken_for_long(slack()).await;
    broken_for_long(webhook()).await;
    let log = log.text();
    assert_eq!(
        log.matches("answer 500, and so for 1h: given up").count(),
        2,
        "{log}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_the_last_outbox() {
    let mut scene = Scene::new(webhook(), |_, _| Ok(()));
    let clone = scene.outbox.clone();
    scene.outbox = Outbox::default();
    clone.tell(&told(Action::Stop, None).event, Mode::Enforce);
    drop(clone);
    scene.task.await.unwrap();
    assert_eq!(scene.stand.attempts.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn closing_delivers_what_waits_and_what_comes_later_is_dropped() {
    let mut scene = Scene::new(slack(), |_, _| Ok(()));
    scene.tell_of_many(Action::Ban, 2);
    scene.tell(Action::Stop, None);
    scene.outbox.close();
    scene.tell(Action::Alarm, None);
    let stand = scene.stand.clone();
    let status = scene.finish().await;
    assert_eq!((status.sent, status.dropped), (3, 1));
    assert_eq!(stand.attempts.lock().unwrap().len(), 2);
}
