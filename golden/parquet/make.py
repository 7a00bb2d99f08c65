"""Writes stories.parquet as pyarrow does by default (dictionaries, snappy, its own metadata): three row groups, absent and
empty texts, a large-string column, and other columns around. Tested against the texts that this script prints.

    python make.py    # pyarrow 26.0.1
"""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

texts = ["Once upon a time.", None, "", "Zwölf Äpfel — 🍎", "Once upon a time.", "  two\nlines  ", "last"]
table = pa.table(
    {
        "id": pa.array(range(7), pa.int64()),
        "text": pa.array(texts, pa.string()),
        "score": pa.array([0.5] * 7, pa.float64()),
        "story": pa.array([f"story {n}" for n in range(7)], pa.large_string()),
        "tags": pa.array([["a", "b"]] * 7, pa.list_(pa.string())),
        "kind": pa.array(["x", "y"] * 3 + ["x"], pa.string()).dictionary_encode(),
    }
)
pq.write_table(table, pathlib.Path(__file__).with_name("stories.parquet"), row_group_size=3)
print([text.strip() for text in texts if text and text.strip()])
