"""What the download job runs: a model from the Hugging Face hub into a folder, checked, then marked as whole."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

from packlight.models.folder import check_folder

marker = Path(os.environ["MODEL_MARKER"])
if marker.exists():
    print(f"{marker.parent}: there already")
else:
    snapshot_download(
        os.environ["MODEL_REPO"],
        revision=os.environ["MODEL_REVISION"],
        local_dir=marker.parent,
        allow_patterns=os.environ["MODEL_FILES"].split(),
    )
    check_folder(marker.parent)
    marker.touch()
    print(f"{marker.parent}: complete")
