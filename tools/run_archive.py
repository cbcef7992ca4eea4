"""Pack what `calibadv compare` needs of finished runs into one file, and unpack it again.

    python tools/run_archive.py pack runs/study study.parquet
    python tools/run_archive.py unpack docs/results/study/runs.parquet runs/study
    calibadv compare runs/study --out report

The file holds the configs and results of the runs, the answers of their validations, and all curves; those of val/ are
in results.json. Reports of the unpacked runs are those of the runs themselves. Values are kept exactly.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from calibadv.analysis.compare.curves import event_files, read_curves
from calibadv.protocol import SearchProtocol
from calibadv.runs.folder import step_of
from calibadv.runs.rollouts import read_rollouts, write_rollouts
from calibadv.types import Question, Rollout, RolloutStatus, Segment

FILES = ("study.json", "arm.yaml", "config.yaml", "config-resume-*.yaml", "results.json", "finished")
_SCHEMA = pa.schema(
    [
        ("folder", pa.dictionary(pa.int32(), pa.string())),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("name", pa.dictionary(pa.int32(), pa.string())),
        ("step", pa.int32()),
        ("value", pa.float32()),
        ("text", pa.dictionary(pa.int32(), pa.string())),
    ]
)
Row = dict[str, Any]


def main() -> None:
    """Pack or unpack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    {"pack": pack, "unpack": unpack}[options.action](options.source, options.out)


def pack(root: Path, out: Path) -> None:
    """Write the runs below a folder into one file."""
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir() and path.name != "rollouts")]
    rows = [row for folder in track(folders, "Packing") for row in _rows(root, folder)]
    columns = {name: [row.get(name) for row in rows] for name in _SCHEMA.names}
    arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=_SCHEMA)
    words = [name for name in _SCHEMA.names if name != "value"]
    encoding = {"use_dictionary": words, "column_encoding": {"value": "BYTE_STREAM_SPLIT"}}
    pq.write_table(table, out, compression="zstd", compression_level=19, **encoding)


def _rows(root: Path, folder: Path) -> Iterator[Row]:
    place = {"folder": folder.relative_to(root).as_posix()}
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            yield {**place, "kind": "file", "name": path.name, "text": path.read_text("utf-8")}
    if event_files(folder):
        for tag, curve in read_curves(folder).items():
            values = {} if tag.startswith("val/") else curve
            for step, value in values.items():
                yield {**place, "kind": "curve", "name": tag, "step": step, "value": value}
    for path in sorted((folder / "rollouts").glob("val-step-*.jsonl")):
        for rollout in read_rollouts(path):
            question = rollout.question
            asked = json.dumps([question.data_source, question.id, question.question, question.golden_answers])
            answer = rollout.messages[-1].answer if rollout.format_valid else None
            text = json.dumps([rollout.status, answer])
            yield {**place, "kind": "answer", "name": asked, "step": step_of(path), "text": text}


def unpack(archive: Path, out: Path) -> None:
    """Write run folders that a report can be made of."""
    table = pq.read_table(archive)
    folders = sorted(set(table["folder"].to_pylist()))
    rows = table.to_pylist()
    for folder in track(folders, "Unpacking"):
        _write(out / folder, [row for row in rows if row["folder"] == folder])


def _write(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row["kind"] == "file":
            (folder / row["name"]).write_text(row["text"], "utf-8")
    curves = [row for row in rows if row["kind"] == "curve"]
    if curves:
        writer = EventFileWriter(str(folder))
        writer.add_event(Event(session_log=SessionLog(status=SessionLog.START), step=0))
        for row in sorted(curves, key=lambda row: row["step"]):
            value = Summary.Value(tag=row["name"], simple_value=row["value"])
            writer.add_event(Event(step=row["step"], summary=Summary(value=[value])))
        writer.close()
    answers = [row for row in rows if row["kind"] == "answer"]
    for step in sorted({row["step"] for row in answers}):
        rollouts = [_rollout(row) for row in answers if row["step"] == step]
        write_rollouts(folder / "rollouts" / f"val-step-{step:06d}.jsonl", rollouts)


def _rollout(row: Row) -> Rollout:
    """The shortest rollout with the same status and answer."""
    source, name, text, golden = json.loads(row["name"])
    status, answer = json.loads(row["text"])
    segments = [Segment("policy", "", 0)]
    if answer is not None:
        segments = [
            Segment("policy", "<think></think><search>q</search>", 0),
            Segment("environment", "", 0),
            Segment("policy", f"<think></think><answer>{answer}</answer>", 0),
        ]
    question = Question(name, text, golden, source)
    messages = SearchProtocol(prepend_think=False).messages(segments)
    return Rollout(question, 0, row["step"], False, tuple(segments), RolloutStatus(status), messages=messages)


if __name__ == "__main__":
    main()
