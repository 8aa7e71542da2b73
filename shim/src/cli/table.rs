//! Tables on the terminal.

use std::fmt::Display;
use std::io::{self, Write};

/// Prints rows, two spaces between columns.
pub(super) fn print<const N: usize>(out: &mut impl Write, rows: &[[String; N]]) -> io::Result<()> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(String::len).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let cells: Vec<_> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

/// A cell of several things, or a dash.
pub(super) fn list(things: &[impl Display]) -> String {
    if things.is_empty() {
        return "-".into();
    }
    let texts: Vec<_> = things.iter().map(ToString::to_string).collect();
    texts.join(",")
}
