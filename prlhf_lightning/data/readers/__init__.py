"""Raw rows from files, one at a time, each with the line that it stands on.

JSON Lines, JSON arrays, CSV (with any usual separator) and Parquet; the first three also gzipped. Memory does not grow
with the file. (Libraries that read these formats report broken input without a line number, which is the first thing
that a user needs.)
"""

from prlhf_lightning.data.readers.read import is_readable, read_rows, scan_rows
from prlhf_lightning.data.readers.text import Unreadable

__all__ = ["Unreadable", "is_readable", "read_rows", "scan_rows"]
