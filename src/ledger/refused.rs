//! Lines that the database refuses, since rows that they name were lost with a database that was set back: each is set
//! aside in a file of its own, so that it stops no other, and an operator can enter it by hand.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use crate::store::{BootId, Line, Store, StoreError, hex};

/// Below the folder of the journals: `<boot>-<sequence>.json`.
const FOLDER: &str = "refused";

/// Sets aside those of `lines` that name a row that is not there, on disk when this returns; gives back the others.
pub async fn set_aside(
    store: &Store,
    journals: &Path,
    boot: BootId,
    lines: Vec<Line>,
) -> Result<Vec<Line>, StoreError> {
    let refused = store.dangling(lines.clone()).await?;
    let (refused, good): (Vec<Line>, Vec<Line>) =
        lines.into_iter().partition(|line| refused.binary_search(&line.sequence).is_ok());
    let folder = journals.join(FOLDER);
    let writing = tokio::task::spawn_blocking(move || {
        fs::create_dir_all(&folder)?;
        for line in refused {
            let path = folder.join(format!("{}-{}.json", hex(&boot), line.sequence));
            tracing::error!(
                line = line.request_id,
                user = line.user_id,
                nano = line.charged_nano,
                file = %path.display(),
                "the database has lost what a line names: the line is set aside, and charged to nobody"
            );
            write(&path, &line)?;
        }
        File::open(&folder)?.sync_all()
    });
    let failed = |error: io::Error| StoreError::Database(format!("a refused line cannot be set aside: {error}"));
    writing.await.map_err(|error| failed(io::Error::other(error)))?.map_err(failed)?;
    Ok(good)
}

/// The same line may come again, when the process dies before the others are shipped: it is the same file then.
fn write(path: &Path, line: &Line) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&serde_json::to_vec_pretty(line)?)?;
    file.sync_all()
}

/// How many lie there, which nobody has entered yet.
pub fn count(journals: &Path) -> usize {
    fs::read_dir(journals.join(FOLDER)).map_or(0, Iterator::count)
}

/// Reminds the operator of what was set aside.
pub fn tell(journals: &Path) {
    let (folder, count) = (journals.join(FOLDER), count(journals));
    if count > 0 {
        tracing::warn!(count, folder = %folder.display(), "lines that the database refused lie there");
    }
}
