//! What a subcommand prints: a table for people, JSON for programs, from the same rows.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Table};
use jiff::Timestamp;
use serde_json::{Map, Value};

/// Rows of objects with the same fields.
#[derive(Debug)]
pub struct Listing {
    columns: Vec<&'static str>,
    rows: Vec<Vec<Value>>,
    /// One object rather than a list.
    single: bool,
}

impl Listing {
    /// A list; each row has a value for each column.
    pub fn list(columns: &'static [&'static str], rows: Vec<Vec<Value>>) -> Listing {
        Listing::list_of(columns.to_vec(), rows)
    }

    /// A list whose columns are known when it is made.
    pub fn list_of(columns: Vec<&'static str>, rows: Vec<Vec<Value>>) -> Listing {
        Listing { columns, rows, single: false }
    }

    /// One object.
    pub fn one(columns: &'static [&'static str], row: Vec<Value>) -> Listing {
        Listing { columns: columns.to_vec(), rows: vec![row], single: true }
    }

    /// As JSON: an array of objects, or the one object.
    pub fn json(&self) -> Value {
        let object = |row: &Vec<Value>| -> Value {
            let fields = self.columns.iter().zip(row);
            fields.map(|(name, value)| ((*name).to_owned(), value.clone())).collect::<Map<_, _>>().into()
        };
        match self.rows.first() {
            Some(row) if self.single => object(row),
            _ => self.rows.iter().map(object).collect(),
        }
    }

    /// As CSV (RFC 4180), with a head; a value that is not there is empty.
    pub fn csv(&self) -> Result<String, csv::Error> {
        let mut out = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
        out.write_record(&self.columns)?;
        for row in &self.rows {
            out.write_record(row.iter().map(|value| if value.is_null() { String::new() } else { shown(value) }))?;
        }
        let bytes = out.into_inner().map_err(|error| error.into_error())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// As text: a table, or a line a field.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        if self.single {
            let row = self.rows.first().map(Vec::as_slice).unwrap_or_default();
            for (name, value) in self.columns.iter().zip(row) {
                table.add_row([Cell::new(name), Cell::new(shown(value))]);
            }
        } else {
            table.set_header(self.columns.iter().map(Cell::new));
            for row in &self.rows {
                table.add_row(row.iter().map(|value| {
                    let alignment = if value.is_number() { CellAlignment::Right } else { CellAlignment::Left };
                    Cell::new(shown(value)).set_alignment(alignment)
                }));
            }
        }
        table.trim_fmt()
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// A moment as RFC 3339, to the second, in UTC.
pub fn moment(ms: i64) -> Value {
    match Timestamp::from_second(ms.div_euclid(1000)) {
        Ok(moment) => moment.to_string().into(),
        Err(_) => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_rows_are_a_table_and_json() {
        let listing =
            Listing::list(&["name", "count"], vec![vec!["a".into(), 1.into()], vec!["b".into(), Value::Null]]);
        assert_eq!(listing.json(), serde_json::json!([{ "name": "a", "count": 1 }, { "name": "b", "count": null }]));
        assert_eq!(listing.csv().unwrap(), "name,count\r\na,1\r\nb,\r\n");
        let quoted = Listing::list(&["name"], vec![vec!["a \"b\", c".into()]]);
        assert_eq!(quoted.csv().unwrap(), "name\r\n\"a \"\"b\"\", c\"\r\n");
        let text = listing.text();
        assert!(text.contains("name") && text.contains('a') && text.contains('-'), "{text}");
    }

    #[test]
    fn a_moment_is_rfc_3339() {
        assert_eq!(moment(1_700_000_000_999), Value::from("2023-11-14T22:13:20Z"));
    }
}
