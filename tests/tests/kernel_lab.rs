//! The laboratory itself: a test that fails in it says nothing about the agent.

use std::{net::IpAddr, path::Path, process::Command, time::Duration};

use anyhow::Result;
use portcullis_tests::lab::{
    Lab, client_v4, client_v6, log,
    netns::ip,
    nginx::Nginx,
    process::Process,
    sink::{Mood, Sink},
    stale,
    traffic::Traffic,
    wait::eventually,
};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);

fn lines(log: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(log)?;
    text.lines()
        .map(|line| Ok(serde_json::from_str(line)?))
        .collect()
}

#[test]
fn nginx_answers_any_client_and_logs_it_with_exactly_the_fields_of_the_format() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let clients: [IpAddr; 4] = [
        client_v4(7),
        client_v4(0xffee),
        client_v6(0, 1),
        client_v6(0xffff, 0xfffe),
    ];
    for client in clients {
        assert_eq!(lab.get(client, "/", SECOND)?, 200, "{client}");
    }
    assert_eq!(lab.get(client_v4(8), "/login", SECOND)?, 401);
    assert_eq!(lab.get(client_v4(8), "/a\"b\\c?\u{e9}", SECOND)?, 404);
    // Nginx logs after it has answered.
    let lines = eventually("seven lines in the log", SOON, || {
        Ok(Some(lines(nginx.log())?).filter(|lines| lines.len() == 7))
    })?;
    for (client, line) in clients.iter().zip(&lines[1..]) {
        assert_eq!(line["source_ip"], json!(client), "{line}");
        assert_eq!(
            (&line["status"], &line["path"]),
            (&json!("200"), &json!("/"))
        );
    }
    let last = lines[6].as_object().unwrap();
    let fields: Vec<_> = last.keys().map(String::as_str).collect();
    assert_eq!(
        fields,
        [
            "method",
            "path",
            "realip_remote_addr",
            "request_id",
            "request_time",
            "response_size",
            "source_ip",
            "status",
            "timestamp",
            "user_agent",
        ]
    );
    assert_eq!(last["path"], "/a\"b\\c?\u{e9}");

    // What the tests write themselves is of the same form.
    let ours: Value = serde_json::from_str(&log::line(client_v4(7), 200))?;
    assert!(ours.as_object().unwrap().keys().eq(last.keys()), "{ours}");
    Ok(())
}

#[test]
fn traffic_keeps_its_rate_and_counts_what_is_answered() -> Result<()> {
    let lab = Lab::new()?;
    let nginx = Nginx::start(&lab)?;
    let people: Vec<_> = (1..=4).map(client_v4).collect();
    let legitimate = Traffic::legitimate(&lab, &people, 10.0, 1)?;
    let attack = Traffic::attack(&lab, &[client_v6(1, 1), client_v6(1, 2)], "/", 100.0)?;
    eventually("300 requests of the attacker", SOON, || {
        Ok((attack.count().answered >= 300).then_some(()))
    })?;
    let (first, _) = attack.first_request().unwrap();
    let took = portcullis_tests::lab::clock::since(first);
    let failure = attack
        .first_failure()
        .or_else(|| legitimate.first_failure());
    let (attack, legitimate) = (attack.stop(), legitimate.stop());
    assert!(
        (2.9..4.0).contains(&took.as_secs_f64()),
        "300 requests at 100 a second took {took:?}"
    );
    assert_eq!((attack.failed, legitimate.failed), (0, 0), "{failure:?}");
    // Poisson, mean 120 in three seconds.
    assert!((70..220).contains(&legitimate.answered), "{legitimate:?}");
    let total = attack.answered + legitimate.answered + 1;
    eventually(&format!("{total} lines in the log"), SOON, || {
        Ok((lines(nginx.log())?.len() as u64 == total).then_some(()))
    })?;
    let from = |source| {
        lines(nginx.log()).map(|lines| {
            lines
                .iter()
                .filter(|line| line["source_ip"] == json!(source))
                .count()
        })
    };
    assert!(
        from(client_v6(1, 1))?.abs_diff(from(client_v6(1, 2))?) < 20,
        "both sources take turns"
    );
    Ok(())
}

#[test]
fn the_sink_keeps_messages_and_can_be_in_a_bad_mood() -> Result<()> {
    let lab = Lab::new()?;
    let sink = Sink::start(&lab)?;
    let post = |number: u32| -> Result<String> {
        let output = lab
            .edge()
            .spawn(
                Command::new("curl")
                    .args([
                        "-s",
                        "-m",
                        "1",
                        "-o",
                        "/dev/null",
                        "-w",
                        "%{http_code}",
                        "--json",
                    ])
                    .arg(json!({"text": format!("no. {number}")}).to_string())
                    .arg(sink.url())
                    .stdout(std::process::Stdio::piped()),
            )?
            .wait_with_output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    assert_eq!(post(1)?, "200");
    for (mood, answer) in [
        (Mood::Busy, "429"),
        (Mood::Broken, "500"),
        (Mood::Hung, "000"),
        (Mood::Down, "000"),
        (Mood::Well, "200"),
    ] {
        sink.set_mood(mood);
        eventually(
            &format!("{answer} from a sink that is {mood:?}"),
            SOON,
            || Ok((post(2)? == answer).then_some(())),
        )?;
    }
    let messages = sink.messages();
    assert_eq!(messages[0].headline(), Some("no. 1"));
    let said: Vec<_> = messages
        .iter()
        .filter_map(|message| message.status)
        .collect();
    assert!(
        said.starts_with(&[200, 429, 500]) && said.ends_with(&[200]),
        "{said:?}"
    );
    Ok(())
}

#[test]
fn nothing_is_left_of_a_laboratory_whose_test_panicked() -> Result<()> {
    let (mut folder, mut names) = (None, None);
    let panicked = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let lab = Lab::new().unwrap();
                let _nginx = Nginx::start(&lab).unwrap();
                let _sleeper =
                    Process::start("sleep", lab.edge(), Command::new("sleep").arg("1000"));
                folder = Some(lab.dir().to_owned());
                names = Some([lab.edge().name().to_owned(), lab.world().name().to_owned()]);
                panic!("this test panics on purpose");
            })
            .join()
            .is_err()
    });
    assert!(panicked);
    let (folder, names) = (folder.unwrap(), names.unwrap());
    assert!(!folder.exists(), "{}", folder.display());
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    assert!(!mounts.contains(folder.to_str().unwrap()), "{mounts}");
    let left = ip(&["netns", "list"])?;
    for name in names {
        assert!(!left.contains(&name), "{left}");
    }
    Ok(())
}

#[test]
fn the_host_s_own_links_are_not_touched() -> Result<()> {
    let links = || ip(&["-o", "link", "show"]);
    let before = links()?;
    let lab = Lab::new()?;
    assert_eq!(links()?, before);
    drop(lab);
    assert_eq!(links()?, before);
    Ok(())
}

#[test]
fn what_a_killed_run_has_left_is_removed_and_a_living_one_s_is_not() -> Result<()> {
    let living = Lab::new()?;
    // No process has this number: it is above Linux's largest.
    let name = format!("{}4194305-0", stale::PREFIX);
    let namespace = format!("{name}-edge");
    ip(&["netns", "add", &namespace])?;
    let mut sleeper = Command::new("ip")
        .args(["netns", "exec", &namespace, "sleep", "1000"])
        .spawn()?;
    eventually("the sleeper to be inside", SOON, || {
        Ok(ip(&["netns", "pids", &namespace])?
            .contains(&sleeper.id().to_string())
            .then_some(()))
    })?;
    let folder = std::env::temp_dir().join(format!("{name}-xyz"));
    std::fs::create_dir_all(folder.join("state"))?;
    stale::clean();
    sleeper.wait()?;
    let left = ip(&["netns", "list"])?;
    assert!(!left.contains(&name), "{left}");
    assert!(!folder.exists());
    assert!(left.contains(living.edge().name()) && living.dir().exists());
    Ok(())
}
