//! A disk that is full while calls run, and has space again.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::field::{Field, Reply, chat};

/// A small disk of its own: what is on it goes with it.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// `None`, said loudly, where nothing may be mounted. Under `CI` that is a failure, if it is root who may not.
    fn mount(mib: u64) -> Option<Disk> {
        let folder = tempfile::tempdir().unwrap();
        let mounting = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(folder.path())
            .output();
        let why = match mounting {
            Ok(done) if done.status.success() => return Some(Disk { folder }),
            Ok(done) => String::from_utf8_lossy(&done.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let root = rustix::process::geteuid().is_root();
        assert!(!root || std::env::var_os("CI").is_none(), "root may not mount a disk: {why}");
        let _ = writeln!(std::io::stderr(), "SKIPPED: no disk that could be filled may be mounted: {why}");
        None
    }

    fn filler(&self) -> PathBuf {
        self.folder.path().join("filler")
    }

    /// Takes what is free, until it is told that this is over.
    fn fill(&self, over: &AtomicBool) {
        let mut filler = fs::OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
        while !over.load(Ordering::Relaxed) {
            while filler.write_all(&[1; 4096]).is_ok() {}
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
    }
}

/// Streams whose answers are held whole, and streams that take slices.
fn stream(address: &str, number: usize) -> Reply {
    let fields = if number.is_multiple_of(2) { r#""stream":true,"max_tokens":3000"# } else { r#""stream":true"# };
    chat(address, fields, "words=3000 each_ms=2")
}

fn ask(address: &str) -> Reply {
    chat(address, r#""max_tokens":10"#, "words=10")
}

/// Asks until so many calls were refused.
fn ask_until_refused(address: &str, times: usize) -> Vec<Reply> {
    let (mut asked, mut refused, began) = (Vec::new(), 0, Instant::now());
    while refused < times {
        assert!(began.elapsed() < Duration::from_secs(20), "a full disk refuses nothing: {:?}", asked.last());
        let reply = ask(address);
        refused += usize::from(reply.status != 200);
        asked.push(reply);
    }
    asked
}

fn fill_a_disk(database_on_it: bool) {
    let Some(disk) = Disk::mount(8) else { return };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("node0");
    std::os::unix::fs::symlink(disk.folder.path(), &data).unwrap();
    let books: &Path = if database_on_it { disk.folder.path() } else { folder.path() };
    let database_url = format!("sqlite:{}", books.join("books.db").display());
    let mut field = Field::on(folder, database_url, 1_000_000_000_000, "");
    let node = field.add_node();
    // Armed at what it will not reach: its journal has small segments, of which it needs a further one soon.
    assert!(field.restart_armed(node, "segment.removed:1000000"));
    let address = field.address(node);

    let over = AtomicBool::new(false);
    let (streams, asked) = thread::scope(|scope| {
        let streams: Vec<_> = (0..10)
            .map(|number| {
                let address = &address;
                scope.spawn(move || stream(address, number))
            })
            .collect();
        thread::sleep(Duration::from_millis(500));
        let filling = scope.spawn(|| disk.fill(&over));
        let mut asked = ask_until_refused(&address, 20);
        let streams: Vec<Reply> = streams.into_iter().map(|stream| stream.join().unwrap()).collect();
        // The room that they kept is free now.
        asked.extend(ask_until_refused(&address, 20));
        over.store(true, Ordering::Relaxed);
        filling.join().unwrap();
        (streams, asked)
    });
    let refused = asked.iter().filter(|reply| reply.status != 200);
    for reply in refused {
        assert!(reply.status == 503 && reply.text.contains("etry-after"), "{reply:?}");
    }

    fs::remove_file(disk.filler()).unwrap();
    field.until("it serves again, without a restart", |_| ask(&address).status == 200);
    field.stop_all();
    let lines = field.lines();
    let line_of = |reply: &Reply| {
        let mut of_it = lines.iter().filter(|line| line["request_id"] == reply.request_id.as_str());
        let line = of_it.next().unwrap_or_else(|| panic!("no line: {reply:?}"));
        assert!(of_it.next().is_none(), "two lines: {line}");
        assert_eq!(line["output_tokens"].as_u64(), Some(reply.words as u64), "{line}");
        line
    };
    for (number, reply) in streams.iter().enumerate() {
        let line = line_of(reply);
        let reason = line["end_reason"].as_str().unwrap();
        match number % 2 {
            0 => assert_eq!((reply.words, reply.whole, reason), (3000, true, "complete"), "its money was held: {line}"),
            _ => assert!(["complete", "length", "upstream_error"].contains(&reason) && reply.words >= 256, "{line}"),
        }
    }
    for reply in asked.iter().filter(|reply| reply.status == 200) {
        line_of(reply);
    }
    field.assert_audit();
}

#[test]
fn a_full_disk_refuses_new_calls_and_drops_no_running_one() {
    fill_a_disk(false);
}

#[test]
fn a_full_disk_that_has_the_database_too_refuses_new_calls_and_drops_no_running_one() {
    fill_a_disk(true);
}
