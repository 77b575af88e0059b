"""A filter's result: a parquet file beside the data set, with a row for each of its rows.

    id, row      of the sample
    SCORE …      float64, null where there is none
    problem      why a row is no sample; null where it is one
    keep         whether it stays, which `filter: FILE` of a data source goes by

Its file metadata says which data set it was made for, and what each score depends on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpgtrans.data.kept import KEY, read_made_for
from vpgtrans.data.sources import Source
from vpgtrans.errors import OutputError
from vpgtrans.files import appearing

OWN = ("id", "row", "problem", "keep")


@dataclass
class Scored:
    """What is known of a data set's rows.

    Attributes:
        ids, problems: Arrow arrays of strings [n]. scores: float64 [n] each, NaN where there is none.
        settings: of each score what it depends on, and whether it does on which other rows are readable.
    """

    ids: Any
    problems: Any
    scores: dict[str, np.ndarray]
    settings: dict[str, Any]

    @property
    def readable(self) -> np.ndarray:
        """bool [n]"""
        return self.problems.is_null().to_numpy(zero_copy_only=False)


def read(file: Path, source: Source) -> Scored | None:
    """What an earlier call wrote; None where there is no file.

    Raises:
        OutputError: the file is something else, or was made for another data set, or for other columns of this one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = source.rows
    if not file.exists():
        return None
    try:
        table = pq.ParquetFile(file)
        made_for = read_made_for(table)
        if made_for is None:
            raise OutputError(f"{file} is there, and no file of scores; give another name")
        if made_for != [len(rows), rows.fingerprint]:
            raise OutputError(f"{file} holds scores of another data set than {rows.name}; give another name")
        said = json.loads(table.schema_arrow.metadata[KEY])
        if said["source"] != source.fingerprint:
            raise OutputError(
                f"{file} holds scores of {rows.name} by other columns, or with its images as they were before; give "
                "another name"
            )
        read = table.read()
        settings = said["settings"]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise OutputError(f"{file} is there, and not readable as scores ({error}); give another name") from error
    names = [name for name in read.column_names if name not in OWN]
    scores = {name: read[name].to_numpy().astype(np.float64) for name in names}
    return Scored(read["id"].combine_chunks(), read["problem"].combine_chunks(), scores, settings)


def write(file: Path, source: Source, scored: Scored, keep: np.ndarray) -> None:
    """Replace the file at once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = {
        "rows": len(source.rows),
        "fingerprint": source.rows.fingerprint,  # what `filter:` goes by, whatever columns a recipe names
        "source": source.fingerprint,
        "settings": scored.settings,
    }
    columns = {
        "id": scored.ids,
        "row": pa.array(np.arange(len(keep))),
        **{name: pa.array(values, from_pandas=True) for name, values in scored.scores.items()},
        "problem": scored.problems,
        "keep": pa.array(keep),
    }
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(said)})
    file.parent.mkdir(parents=True, exist_ok=True)
    with appearing(file) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=1 << 17)
