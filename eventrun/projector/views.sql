-- A generation of views. All of it is made from the log and may be deleted. Numbers (INTEGER PRIMARY KEY) depend on
-- the order of the work, so they are no part of what `Views.digest` hashes. Every BLOB ends with its CRC-32.

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

-- How far each view has read, and the digest of the batch there: with another log in its place the views are void.
CREATE TABLE checkpoints (
    view TEXT NOT NULL,
    version INTEGER NOT NULL,
    position INTEGER NOT NULL,
    batch BLOB NOT NULL,
    PRIMARY KEY (view, version)
) WITHOUT ROWID;

-- The columns before `state` repeat what it holds, to choose and order by. `tags` holds the tags' names, each between
-- two unit separators (U+001F).
CREATE TABLE trials (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL,
    grp TEXT NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    tags TEXT NOT NULL,
    created_ns INTEGER,
    events INTEGER NOT NULL,
    position INTEGER NOT NULL,
    raw_status TEXT NOT NULL,
    error TEXT,
    description TEXT NOT NULL,
    version TEXT,
    attempt INTEGER NOT NULL,
    started_ns INTEGER,
    finished_ns INTEGER,
    modified_ns INTEGER,
    duration_s REAL,
    hidden INTEGER NOT NULL,
    state BLOB NOT NULL
);
CREATE INDEX trials_by_time ON trials (created_ns, id);
CREATE INDEX trials_by_name ON trials (name);
CREATE INDEX trials_by_group ON trials (project, grp, created_ns, id);
CREATE INDEX trials_by_position ON trials (position);

-- Params, metadata and tags, to filter by: "params/opt/lr" and its value, as a number or a text. `there` is 0 for None;
-- what is neither number nor text is there and has no value. A key's rows of all trials lie together.
CREATE TABLE facts (
    key TEXT NOT NULL,
    trial INTEGER NOT NULL,
    number,
    text TEXT,
    there INTEGER NOT NULL,
    PRIMARY KEY (key, trial)
) WITHOUT ROWID;

-- The same of metrics' statistics; what isn't a number is NULL.
CREATE TABLE metrics (
    name TEXT NOT NULL,
    trial INTEGER NOT NULL,
    count INTEGER NOT NULL,
    last,
    latest,
    min,
    max,
    mean,
    PRIMARY KEY (name, trial)
) WITHOUT ROWID;

-- What is needed to go on folding a trial, and the latest time of its events; apart from `trials`, because listings never read it.
CREATE TABLE folds (
    trial INTEGER PRIMARY KEY,
    until_ns INTEGER NOT NULL,
    fold BLOB NOT NULL
);

-- A trial's fold as it was at a position, for the past.
CREATE TABLE snapshots (
    trial INTEGER NOT NULL,
    position INTEGER NOT NULL,
    until_ns INTEGER NOT NULL,
    fold BLOB NOT NULL,
    PRIMARY KEY (trial, position)
);

-- The points of one metric of one trial: `count` in all, of which the last `count % CHUNK` are in `open`.
CREATE TABLE series (
    number INTEGER PRIMARY KEY,
    trial INTEGER NOT NULL,
    name TEXT NOT NULL,
    count INTEGER NOT NULL,
    open BLOB,
    UNIQUE (trial, name)
);

-- Full chunks. The key is `series.number << 24 | n`: they lie together, in order, without an index of their own.
CREATE TABLE chunks (
    number INTEGER PRIMARY KEY,
    points BLOB NOT NULL
);

-- The own events of groups and projects.
CREATE TABLE subjects (
    subject TEXT PRIMARY KEY,
    hidden_project TEXT, -- the project's name if this is a project that is hidden
    fold BLOB NOT NULL
);

-- The user's own projections.
CREATE TABLE states (
    projection TEXT NOT NULL,
    version INTEGER NOT NULL,
    key TEXT NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (projection, version, key)
);
