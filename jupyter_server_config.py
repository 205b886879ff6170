"""JupyterLab saves this project's notebooks as `nbdev-clean` leaves them: without an edit, the same bytes.

A widget lives in its kernel, so a saved notebook keeps the text that stands for it ("run this cell"), not the widget.

`make` copies this file into the environment it makes (`.venv/etc/jupyter`); every JupyterLab there reads it.
"""
import warnings
from pathlib import Path

from nbdev.clean import clean_nb
from nbdev.config import get_config

WIDGET = "application/vnd.jupyter.widget-view+json"
warnings.filterwarnings("ignore", "Overriding existing pre_save_hook")  # it is set twice


def clean_before_save(model, path, contents_manager, **_):
    "Leave out what a kernel adds: in notebooks of this project, and in no others."
    file = Path(contents_manager.root_dir, path.strip("/")).resolve()
    try: config = get_config(path=file.parent)
    except ValueError: return  # a folder with settings of nbdev 2
    ours = config.lib_name == "worldmodels_nb" and config.nbs_path in file.parents
    if ours and model["type"] == "notebook":
        clean_nb(model["content"], allowed_cell_metadata_keys=config.allowed_cell_metadata_keys)
        for cell in model["content"]["cells"]:
            for output in cell.get("outputs", []): output.get("data", {}).pop(WIDGET, None)


c.ContentsManager.pre_save_hook = clean_before_save  # noqa: F821  Jupyter's configuration
