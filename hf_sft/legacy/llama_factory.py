"""Keys of LLaMA-Factory alone: its list of data sets, and what its models see beside text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sft.legacy.rules import Old, Several, Values, is_none, read_object, when

_WAY = "name the file itself as train_file (eval_file)"
_SAME = {  # field of an entry's columns -> names of it that are known here without a word
    "prompt": ("instruction", "text"), "query": ("input",), "response": ("output",), "history": ("history",),
    "system": ("system",), "messages": ("conversations", "messages"), "tools": ("tools",), "chosen": ("chosen",),
    "rejected": ("rejected",),
}  # fmt: skip
_SILENT = ("file_name", "file_sha1", "formatting", "ranking", "columns", "tags")
_TEXT = Old(None, note="models of text alone are trained")


def _files(new: str) -> Old:
    return Old(
        new,
        seeing=lambda value, values: _paths(value, values, new),
        doc="the files that dataset_info.json in dataset_dir (data) gives these names; columns of other names are an error",
    )


def _paths(value: Any, values: Values, new: str) -> Any:
    """The path of each named data set, one or a list."""
    if is_none(value):
        return Several({}, note="no data are named")
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"it must be names of data sets: {_WAY}")
    given = values.get("dataset_dir")
    folder = Path("data" if is_none(given) else str(given))
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(f"there is no {folder / 'dataset_info.json'} that says where its records are: {_WAY}")
    try:
        info = read_object(folder / "dataset_info.json", "dataset_info.json")
    except ValueError as error:
        raise ValueError(f"{error}: {_WAY}") from None
    paths = [_path(name.strip(), info, folder) for name in names]
    return Several({new: paths[0] if len(paths) == 1 else paths}, note="as dataset_info.json says")


def _path(name: str, info: dict[str, Any], folder: Path) -> str:
    entry = info.get(name)
    where = f"dataset_info.json of {folder}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} has no {name}: {_WAY}")
    if not entry.get("file_name"):
        raise ValueError(f"{name} is no local file in {where}: {_WAY}, or the data set of the hub")
    path = folder / str(entry["file_name"])
    if not path.exists():
        raise ValueError(f"{where} says that {name} is {path}, and there is no such file: {_WAY}")
    columns = entry.get("columns") or {}
    if not isinstance(columns, dict) or any(column not in _SAME.get(field, ()) for field, column in columns.items()):
        raise ValueError(
            f"{name} has columns of its own in {where}: {_WAY}, as an object {{path: {path}, columns: {{...}}}} that maps our "
            "names of fields to those of the records"
        )
    if others := [
        key for key, said in entry.items() if key not in _SILENT and not (key == "split" and said == "train")
    ]:
        raise ValueError(f"{name} has {', '.join(others)} in {where}, which nothing here reads from there: {_WAY}")
    return str(path)


LLAMA_FACTORY: dict[str, Old] = {
    "dataset": _files("train_file"),
    "eval_dataset": _files("eval_file"),
    "dataset_dir": Old(None, note="train_file and eval_file name the files"),
    "neat_packing": Old("packing", when(true=True), doc="packed documents never see each other"),
    **dict.fromkeys(("image_max_pixels", "video_max_pixels"), _TEXT),
}
