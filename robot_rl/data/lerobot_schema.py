"""How arrays become LeRobot v3.0 features and parquet columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.data.statistics import PARTS, Statistics
from robot_rl.data.video import KEYFRAME_INTERVAL, pixel_format

NEXT = ("reward", "success", "done")
"""Extras whose column LeRobot calls ``next.<name>``: they tell what the action led to."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
CHUNK_SIZE = 1000
_NUMBERS = {float: pa.float64(), int: pa.int64(), bool: pa.bool_()}


def column_of(extra: str) -> str:
    """Return the column of an extra."""
    return f"next.{extra}" if extra in NEXT else extra


def features_of(spec: Spec, extras: Mapping[str, ArraySpec]) -> dict[str, dict[str, Any]]:
    """Return the features of ``info.json``: observations, action, extras and LeRobot's own columns, in file order."""
    features = {f"observation.{key}": _feature(array, spec.rate_hz) for key, array in spec.observation.items()}
    features["action"] = _feature(spec.action, spec.rate_hz)
    for name in ("episode_index", "frame_index"):
        features[name] = _feature(ArraySpec((1,), "int64"), 0)
    features["timestamp"] = _feature(ArraySpec((1,), "float32"), 0)
    for name, array in extras.items():
        features[column_of(name)] = _feature(array, spec.rate_hz)
    for name in ("index", "task_index"):
        features[name] = _feature(ArraySpec((1,), "int64"), 0)
    return features


def _feature(array: ArraySpec, rate_hz: float) -> dict[str, Any]:
    if array.is_image:
        height, width, channels = array.shape
        info = {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": pixel_format(height, width),
            "video.is_depth_map": False,
            "video.fps": rate_hz,
            "video.channels": channels,
            "video.g": KEYFRAME_INTERVAL,
            "has_audio": False,
        }
        return {"dtype": "video", "shape": [*array.shape], "names": ["height", "width", "channels"], "info": info}
    return {"dtype": array.dtype, "shape": list(array.shape or (1,)), "names": list(array.names) or None}


def data_table(features: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return the rows of one episode; ``columns`` holds each feature that is no video as (T, …)."""
    stored = {name: feature for name, feature in features.items() if feature["dtype"] != "video"}
    fields = [pa.field(name, _arrow_type(feature)) for name, feature in stored.items()]
    described = {"info": {"features": {name: _described(feature) for name, feature in stored.items()}}}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps(described)})
    arrays = [_arrow_array(columns[field.name], field.type) for field in fields]
    return pa.Table.from_arrays(arrays, schema=schema)


def _arrow_type(feature: Mapping[str, Any]) -> pa.DataType:
    """Return a scalar for shape (1,), a list of fixed length for a vector, and nested lists for more axes."""
    kind = pa.from_numpy_dtype(np.dtype(feature["dtype"]))
    shape = tuple(feature["shape"])
    if shape == (1,):
        return kind
    if len(shape) == 1:
        return pa.list_(kind, shape[0])
    for _ in shape:
        kind = pa.list_(kind)
    return kind


def _described(feature: Mapping[str, Any]) -> dict[str, Any]:
    """Return a feature in the words of the ``datasets`` package, which LeRobot reads the files with."""
    shape, value = tuple(feature["shape"]), {"dtype": feature["dtype"], "_type": "Value"}
    if shape == (1,):
        return value
    if len(shape) == 1:
        return {"feature": value, "length": shape[0], "_type": "Sequence"}
    return {"shape": list(shape), "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}


def _arrow_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_nested(kind):
        return pa.array(values.reshape(-1), type=kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=kind.value_type), kind.list_size)
    return pa.array(values.tolist(), type=kind)


def tasks_table(tasks: list[str]) -> pa.Table:
    """Return ``meta/tasks.parquet``, whose second column is the index of a pandas table."""
    index = "__index_level_0__"
    columns: list[dict[str, Any]] = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
    ]
    pandas = {
        "index_columns": [index],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [{**column, "metadata": None} for column in columns],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.3",
    }
    schema = pa.schema(
        [pa.field("task_index", pa.int64()), pa.field(index, pa.string())], metadata={"pandas": json.dumps(pandas)}
    )
    return pa.Table.from_arrays([pa.array(range(len(tasks)), pa.int64()), pa.array(tasks, pa.string())], schema=schema)


def episodes_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return ``meta/episodes``: ``rows`` as made by `episode_row`."""
    types = {name: _meta_type(name, value) for name, value in rows[0].items()}
    schema = pa.schema([pa.field(name, kind) for name, kind in types.items()])
    described = {"info": {"features": {name: _meta_described(kind) for name, kind in types.items()}}}
    table = pa.Table.from_pylist(rows, schema=schema)
    return table.replace_schema_metadata({"huggingface": json.dumps(described)})


def episode_row(
    number: int,
    length: int,
    first_index: int,
    task: str,
    place: tuple[int, int],
    videos: Mapping[str, tuple[int, int, float, float]],
    statistics: Mapping[str, Statistics],
) -> dict[str, Any]:
    """Return one row of ``meta/episodes``.

    Args:
        number: the episode's index.
        length: its frames.
        first_index: frames of all episodes before it.
        task: its instruction.
        place: chunk and file of its rows; the row itself is filed under the same.
        videos: for each camera column chunk, file, and start and end in seconds.
        statistics: of each feature.
    """
    row: dict[str, Any] = {
        "episode_index": number,
        "data/chunk_index": place[0],
        "data/file_index": place[1],
        "dataset_from_index": first_index,
        "dataset_to_index": first_index + length,
    }
    for key, (chunk, file, start, end) in videos.items():
        row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file}
        row |= {f"videos/{key}/from_timestamp": start, f"videos/{key}/to_timestamp": end}
    row |= {"tasks": [task], "length": length}
    for name, found in statistics.items():
        row |= {f"stats/{name}/{part}": found[part].tolist() for part in PARTS}
    return row | {"meta/episodes/chunk_index": place[0], "meta/episodes/file_index": place[1]}


def _meta_type(name: str, value: Any) -> pa.DataType:
    if name == "tasks":
        return pa.list_(pa.string())
    if name.endswith(("/from_timestamp", "/to_timestamp")):
        return pa.float64()
    if not isinstance(value, list):
        return pa.int64()
    kind = pa.list_(_NUMBERS[type(_innermost(value))])
    while isinstance(value[0], list):
        value, kind = value[0], pa.list_(kind)
    return kind


def _innermost(value: Any) -> Any:
    while isinstance(value, list):
        value = value[0]
    return value


def _meta_described(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _meta_described(kind.value_type), "_type": "Sequence"}
    names = {pa.float64(): "float64", pa.int64(): "int64", pa.bool_(): "bool", pa.string(): "string"}
    return {"dtype": names[kind], "_type": "Value"}
