//! Log lines on their way out: gathered, and written by a thread of their own a few at a time.
//!
//! A queue that wakes its thread for each line costs a gateway at part load a fifth of its CPU time, in switches between
//! threads alone; here the thread wakes fifty times a second at the most.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines are gathered for so long, unless many come.
const GATHERED_FOR: Duration = Duration::from_millis(20);
/// So many bytes are written at once, without waiting for more.
const MANY_BYTES: usize = 64 << 10;
/// Lines beyond this are lost, and counted: a disk that hangs must not take the memory or the time of requests.
const WAITING_BYTES_MAX: usize = 8 << 20;

/// Where lines are written to; cheap to clone.
#[derive(Clone, Debug)]
pub struct Lines(Arc<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    lost: u64,
    stopped: bool,
}

/// Writes what is left when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Guard {
    waiting: Arc<Waiting>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the thread that writes to `out`.
pub fn gather(out: impl Write + Send + 'static) -> io::Result<(Lines, Guard)> {
    let waiting = Arc::<Waiting>::default();
    let read = waiting.clone();
    let thread = std::thread::Builder::new().name("log".into()).spawn(move || read.write_all_to(out))?;
    Ok((Lines(waiting.clone()), Guard { waiting, thread: Some(thread) }))
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    fn add(&self, line: &[u8]) {
        let mut state = self.lock();
        let before = state.bytes.len();
        if before + line.len() > WAITING_BYTES_MAX {
            state.lost += 1;
            return;
        }
        state.bytes.extend_from_slice(line);
        let is_first = before == 0;
        let is_many = before < MANY_BYTES && state.bytes.len() >= MANY_BYTES;
        drop(state);
        if is_first || is_many {
            self.wake.notify_one();
        }
    }

    fn write_all_to(&self, mut out: impl Write) {
        let mut bytes = Vec::new();
        loop {
            let mut state = self.lock();
            while state.bytes.is_empty() && !state.stopped {
                state = self.wake.wait(state).expect("no holder of this lock panics");
            }
            let few = |state: &mut State| state.bytes.len() < MANY_BYTES && !state.stopped;
            (state, _) = self.wake.wait_timeout_while(state, GATHERED_FOR, few).expect("no holder of this lock panics");
            std::mem::swap(&mut bytes, &mut state.bytes);
            let (lost, stopped) = (std::mem::take(&mut state.lost), state.stopped);
            drop(state);
            // There is nobody to tell of an error.
            let _ = out.write_all(&bytes);
            if lost > 0 {
                let _ = writeln!(out, "{lost} lines of the log were lost: they could not be written in time");
            }
            let _ = out.flush();
            if stopped && bytes.is_empty() {
                return;
            }
            bytes.clear();
            bytes.shrink_to(MANY_BYTES);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Lines;

    fn make_writer(&self) -> Lines {
        self.clone()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.waiting.lock().stopped = true;
        self.waiting.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it does not panic
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// What was written, in a file that takes its time until it is let go.
    struct Slow {
        written: Arc<Mutex<Vec<u8>>>,
        go: mpsc::Receiver<()>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.go.recv(); // at once where nobody holds it any more
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Slow, Arc<Mutex<Vec<u8>>>, mpsc::Sender<()>) {
        let (hold, go) = mpsc::channel();
        let written = Arc::<Mutex<Vec<u8>>>::default();
        (Slow { written: written.clone(), go }, written, hold)
    }

    #[test]
    fn lines_of_many_threads_are_all_written_each_whole() {
        let (out, written, hold) = slow();
        drop(hold);
        let (lines, guard) = gather(out).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let lines = lines.clone();
                scope.spawn(move || {
                    (0..500).for_each(|i| lines.make_writer().write_all(format!("{thread} {i}\n").as_bytes()).unwrap())
                });
            }
        });
        drop(guard);
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        for thread in 0..4 {
            let own: Vec<_> = text.lines().filter(|line| line.starts_with(&format!("{thread} "))).collect();
            assert_eq!(own, (0..500).map(|i| format!("{thread} {i}")).collect::<Vec<_>>(), "in its order");
        }
    }

    #[test]
    fn a_file_that_hangs_costs_lines_and_no_memory_and_says_so() {
        let (out, written, hold) = slow();
        let (mut lines, guard) = gather(out).unwrap();
        let line = [b'x'; 1 << 16];
        for _ in 0..400 {
            lines.write_all(&line).unwrap();
        }
        assert!(lines.0.lock().bytes.len() <= WAITING_BYTES_MAX);
        drop(hold);
        drop(guard);
        let written = written.lock().unwrap();
        assert!(written.len() < 400 * line.len());
        assert!(String::from_utf8_lossy(&written).contains("lines of the log were lost"));
    }
}
