"""Upload of a converted folder to the Hugging Face Hub, the library function behind ``tnnlm push``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from tnnlm import __version__
from tnnlm.checkpoints.converted import load_converted
from tnnlm.checkpoints.hf_files import STANDALONE, code_files
from tnnlm.checkpoints.locate import find_converted
from tnnlm.checkpoints.manifest import REMEDY, verify_published
from tnnlm.deployment.save import only_writer
from tnnlm.errors import CheckpointError, UserError, one_line
from tnnlm.files import check_no_link
from tnnlm.reading import check_regular, read_json, read_text

CARD = "README.md"
PUBLISHED = re.compile(
    r"config\.json|generation_config\.json|conversion\.json|checksums\.json|prompts\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|model\.safetensors|kernels\.safetensors"
    r"|modeling_tnnlm\.py|standalone_tnnlm\.py|README\.md|(LICENSE|NOTICE)[\w.-]*"
)
"""Names of the files of a converted folder that are uploaded."""
_PROBLEMS = {
    400: ("the Hub refuses the request", "check the name and the model card"),
    401: (
        "the token is not valid",
        "create one with write access at hf.co/settings/tokens",
    ),
    403: ("the token may not write there", "use a token with write access to this owner's repositories"),
    404: ("no such owner, or the token may not see it", "check the name and the token"),
    409: ("another upload was made meanwhile, or the name is taken", "run the same command again"),
    412: ("another upload was made meanwhile", "run the same command again"),
}
"""Problem and remedy by HTTP status."""


@dataclass(frozen=True)
class Upload:
    """Checked files of a converted folder, to be uploaded in one commit."""

    folder: Path
    repo: str
    """Name of the repository, ``OWNER/NAME``, or ``NAME`` for the owner of the token."""
    public: bool
    files: dict[str, int]
    """Size in bytes of each file, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason for each file or folder that is not uploaded, by name."""
    notes: list[str] = field(default_factory=list)
    """Missing parts that the user may add before the upload."""


def plan_upload(target: str, repo: str, public: bool = False, runs_dir: Path = Path("runs")) -> Upload:
    """Check a converted folder and return what is to be uploaded, without using the network.

    Args:
        target: Converted folder, or run (name or folder) that contains one.
        repo: Name of the repository, ``OWNER/NAME``.
        public: Whether a new repository is to be public.
        runs_dir: Folder of the runs.

    Raises:
        UserError: If the name is not valid, nothing converted is found, a file is damaged, was replaced or is
            a link, or code in it is not that of tnnlm.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo}: is no name on the Hub ({one_line(error)})", "give OWNER/NAME") from None
    folder = find_converted(target, runs_dir).resolve()
    with only_writer(folder):
        names = sorted(path.name for path in folder.iterdir())
        files = [name for name in names if PUBLISHED.fullmatch(name)]
        for name in files:
            check_no_link(folder / name, "upload a folder with the files themselves")
        sizes = {name: check_regular(folder / name, REMEDY) for name in files}
        load_converted(folder)
        verify_published(folder, read_json(folder / "config.json", REMEDY), code_files())
        notes = _notes(folder, sizes)
    return Upload(folder, repo, public, sizes, {n: _reason(n) for n in names if n not in sizes}, notes)


def push(upload: Upload) -> str:
    """Upload the files of a folder in one commit, and return the address of the repository.

    The repository is created if it does not exist, privately unless the upload is public.

    Raises:
        UserError: If there is no token or no network, the Hub refuses the token or the name, or the
            repository is public and the upload is not, or the reverse.
    """
    try:
        token = get_token()
        if token is None:
            raise UserError("HF_TOKEN: is not set, and there is no login", "set it, or run: hf auth login")
        return _upload(HfApi(token=token, library_name="tnnlm", library_version=__version__), upload)
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        problem, remedy = _PROBLEMS.get(status, (one_line(error), "try again later"))
        raise UserError(f"{upload.repo}: {problem} (HTTP {status})", remedy) from None
    except Exception as error:  # the library raises many classes for the network
        raise UserError(
            f"{upload.repo}: the upload failed ({one_line(error)})",
            "check the network, and run the same command again",
        ) from None


def _upload(api: HfApi, upload: Upload) -> str:
    made = api.create_repo(upload.repo, private=not upload.public, exist_ok=True)
    name = made.repo_id
    private: Any = api.model_info(name).private
    if not private and not upload.public:
        raise UserError(f"{name}: exists, and is public", "add --public, or give another name")
    if private and upload.public:
        raise UserError(f"{name}: exists, and is private", "omit --public, or change it on its page")
    files = [CommitOperationAdd(file, str(upload.folder / file)) for file in upload.files]
    api.create_commit(name, files, commit_message=f"Upload a model with tnnlm {__version__}")
    return str(made)


def _notes(folder: Path, sizes: dict[str, int]) -> list[str]:
    """Return what is missing in the model card, and for machines without tnnlm.

    Raises:
        CheckpointError: If the metadata of the card can't be read.
    """
    notes = []
    if CARD not in sizes:
        notes.append(f"{CARD}: is missing; the repository gets no model card")
    else:
        text = read_text(folder / CARD, "correct its metadata")
        try:
            stated = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
        except Exception as error:  # YAML, of any kind of fault
            raise CheckpointError(
                f"{folder / CARD}: its metadata can't be read ({one_line(error)})", "correct it"
            ) from None
        options = {"license": "--license", "language": "--language"}
        missing = [option for entry, option in options.items() if not stated.get(entry)]
        if missing:
            stating = " and ".join(missing)
            notes.append(f"{CARD}: says nothing for {stating} of convert.py; add it there or in its metadata")
    if STANDALONE not in sizes:
        notes.append(f"{STANDALONE}: is missing, so that the model loads only where tnnlm is installed")
    return notes


def _reason(name: str) -> str:
    if name.endswith(".pt2"):
        return "native code, which only the machine that compiled it loads"
    if name in ("export", "onnx"):
        return "exported programs, which tnnlm does not load"
    return "not a file of the model"
