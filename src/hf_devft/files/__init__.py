"""The one door by which files come in and go out: what is read is checked first, what is written is whole or not
there."""

from hf_devft.files.checksums import CHECKSUMS, forget_checksum, note_checksum
from hf_devft.files.reading import (
    FLOATS,
    as_record,
    check_whole,
    is_sound,
    naming,
    read_json,
    read_record,
    read_tensors,
)
from hf_devft.files.writing import (
    atomic_file,
    atomic_folder,
    delete_folders,
    link_or_copy,
    link_whole,
    replace_files,
    write_json,
    write_tensors,
)


__all__ = [
    "CHECKSUMS",
    "FLOATS",
    "as_record",
    "atomic_file",
    "atomic_folder",
    "check_whole",
    "delete_folders",
    "forget_checksum",
    "is_sound",
    "link_or_copy",
    "link_whole",
    "naming",
    "note_checksum",
    "read_json",
    "read_record",
    "read_tensors",
    "replace_files",
    "write_json",
    "write_tensors",
]
