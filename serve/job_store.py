"""Video jobs on disk: one SQLite table, and beside it a folder with the files of each job."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"


@dataclass
class Job:
    """A video to be made, or made. progress: in percent. error: code and message, of a failed one.

    earlier: of a fork, the prompts before `prompt`, as JSON: [the block before which it ends, prompt] each, in order.
    """

    id: str
    created_at: int
    prompt: str
    model: str
    seconds: float
    width: int
    height: int
    seed: int
    status: str = QUEUED
    progress: int = 0
    completed_at: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    remixed_from: str | None = None
    earlier: str | None = None

    @property
    def prompts(self) -> list[tuple[int | None, str]]:
        """All prompts in order, each with the block before which it ends; None for the last one."""
        earlier = [] if self.earlier is None else json.loads(self.earlier)
        return [*((int(end), str(text)) for end, text in earlier), (None, self.prompt)]

    def prompts_before(self, block: int) -> str | None:
        """`earlier` of a fork that has another prompt from a block on."""
        earlier = []
        for end, text in self.prompts:
            last = end is None or end >= block
            earlier.append([block if last else end, text])
            if last:
                break
        return json.dumps(earlier) if block else None


COLUMNS = tuple(field.name for field in fields(Job))
TYPES = {"int": "INTEGER", "float": "REAL", "str": "TEXT"}


def column_type(field: Field[Any]) -> str:
    """Type of a field in SQLite."""
    return TYPES[str(field.type).split(" ")[0]]


class JobStore:
    """All jobs, in the order they were created. It belongs to one thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None)
        self.database.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode=WAL")
        columns = ", ".join(f"{field.name} {column_type(field)}" for field in fields(Job))
        self.database.execute(
            f"CREATE TABLE IF NOT EXISTS jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, {columns}, UNIQUE (id))"
        )
        there = {row["name"] for row in self.database.execute("PRAGMA table_info(jobs)")}
        for field in fields(Job):  # of a later version than the file's
            if field.name not in there:
                self.database.execute(f"ALTER TABLE jobs ADD COLUMN {field.name} {column_type(field)}")

    def requeue(self) -> None:
        """Have jobs that a stopped server was at made again."""
        self.database.execute(
            "UPDATE jobs SET status = ?, progress = 0 WHERE status = ?", (QUEUED, IN_PROGRESS)
        )

    def add(self, job: Job) -> None:
        marks = ", ".join("?" for _ in COLUMNS)
        self.database.execute(
            f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", tuple(asdict(job).values())
        )

    def update(self, job: Job) -> None:
        changes = ", ".join(f"{name} = ?" for name in COLUMNS)
        self.database.execute(f"UPDATE jobs SET {changes} WHERE id = ?", (*asdict(job).values(), job.id))

    def get(self, id: str) -> Job | None:
        rows = self.database.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchall()
        return job_of(rows[0]) if rows else None

    def remove(self, id: str) -> None:
        """Remove a job and its files."""
        self.database.execute("DELETE FROM jobs WHERE id = ?", (id,))
        for file in self.folder.glob(f"{id}.*"):
            file.unlink(missing_ok=True)

    def page(self, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """At most `limit` jobs after the one with the id `after`."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = "", []
        if after is not None:
            where = f"WHERE number {beyond} (SELECT number FROM jobs WHERE id = ?)"
            values = [after]
        rows = self.database.execute(f"SELECT * FROM jobs {where} ORDER BY number {order} LIMIT ?", (*values, limit))
        return [job_of(row) for row in rows]

    def next_queued(self) -> Job | None:
        query = "SELECT * FROM jobs WHERE status = ? ORDER BY number LIMIT 1"
        rows = self.database.execute(query, (QUEUED,)).fetchall()
        return job_of(rows[0]) if rows else None

    def count(self, *statuses: str) -> int:
        marks = ", ".join("?" for _ in statuses)
        (count,) = self.database.execute(f"SELECT COUNT(*) FROM jobs WHERE status IN ({marks})", statuses).fetchone()
        return int(count)

    def finished_beyond(self, most: int) -> list[str]:
        """The ids of finished jobs that are older than the newest `most`."""
        rows = self.database.execute(
            "SELECT id FROM jobs WHERE status IN (?, ?) ORDER BY number DESC LIMIT -1 OFFSET ?",
            (COMPLETED, FAILED, most),
        )
        return [row["id"] for row in rows]

    def file(self, id: str, suffix: str) -> Path:
        """The place of one of a job's files."""
        return self.folder / f"{id}.{suffix}"

    def close(self) -> None:
        self.database.close()


def job_of(row: Any) -> Job:
    return Job(**{name: row[name] for name in COLUMNS})
