"""Upload a folder to a repository of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from chunkflow_cli.errors import UsageError, first_line

LOGIN = "hf auth login, or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """A repository of models on the hub."""

    repository: str
    is_logged_in: bool

    @classmethod
    def to(cls, repository: str, *, is_dry: bool) -> Upload:
        """Return an upload to a repository.

        Raises:
            UsageError: its name is invalid, or there is no token to upload with, unless nothing is going to be.
        """
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            reason = first_line(error)
            raise UsageError(f"--push-to-hub={repository} is not the name of a repository: {reason}") from error
        upload = cls(repository, get_token() is not None)
        if not upload.is_logged_in and not is_dry:
            raise UsageError(f"--push-to-hub={repository}: you are not logged in to the hub\n  {LOGIN}")
        return upload

    @property
    def url(self) -> str:
        from huggingface_hub.constants import ENDPOINT

        return f"{ENDPOINT}/{self.repository}"

    def send(self, folder: Path) -> str:
        """Upload all files of a folder, and return the address of the repository. A new one is private.

        Raises:
            UsageError: the hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses

        api = HfApi(library_name="chunkflow")
        try:
            url = api.create_repo(self.repository, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id, folder_path=folder, commit_message="Upload a model trained with chunkflow"
            )
        except (HTTPError, OSError, ValueError) as error:
            reason = first_line(error)
            raise UsageError(
                f"--push-to-hub={self.repository}: the upload failed: {reason}\n"
                f"  the model is in {folder}; to try again: hf upload {self.repository} {folder}"
            ) from error
        return str(url)
