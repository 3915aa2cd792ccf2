"""Files and folders: atomic writes, checks of paths, locks, and what killed processes leave behind."""

from tnnlm.files.atomic import append_text, atomic_file, atomic_folder, flush_to_disk, write_text
from tnnlm.files.cache import cache_root
from tnnlm.files.checks import check_file, check_folder, check_no_link, check_parents, make_parents
from tnnlm.files.leftovers import remove_leftovers, restore_replaced
from tnnlm.files.locks import only_process

__all__ = [
    "append_text",
    "atomic_file",
    "atomic_folder",
    "cache_root",
    "check_file",
    "check_folder",
    "check_no_link",
    "check_parents",
    "flush_to_disk",
    "make_parents",
    "only_process",
    "remove_leftovers",
    "restore_replaced",
    "write_text",
]
