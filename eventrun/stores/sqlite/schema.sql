-- The log, format 1. Run by whoever opens an empty log.db to write; two processes may do so at once.
--
-- The page size stays SQLite's default of 4,096 bytes: with 16 KiB pages a commit of one small batch writes four
-- times as much, and batches of 32 KiB to 1 MiB were written no faster (tried: 60 and 250 MB/s with either).
BEGIN IMMEDIATE;

-- A stream is one subject's events by one writer; `writer` is the unsigned 64-bit id in two's complement.
CREATE TABLE IF NOT EXISTS streams (
    id INTEGER PRIMARY KEY,
    subject TEXT NOT NULL,
    writer INTEGER NOT NULL,
    UNIQUE (subject, writer)
);

-- One row per batch. `position` is that of its first event: positions run on without gaps. `stream`, `first` and
-- `count` repeat what the header in `frame` says, and readers compare them. `frame` stays last: SQLite then finds
-- the other columns without reading a large batch's overflow pages.
CREATE TABLE IF NOT EXISTS batches (
    position INTEGER PRIMARY KEY,
    stream INTEGER NOT NULL,
    first INTEGER NOT NULL,
    count INTEGER NOT NULL,
    frame BLOB NOT NULL
);

-- SQLite ends each entry with the row's position, so this finds a stream's batches in log order, its tip, and where
-- to go on after a position. One over (stream, first) costs the same and can't do the last. It is the dear part of a
-- commit of 1,000 streams with long histories (20 ms instead of 4), so there is only this one.
CREATE INDEX IF NOT EXISTS batches_of_stream ON batches (stream);

PRAGMA application_id = 0x65767275; -- "evru"
PRAGMA user_version = 1;
COMMIT;
