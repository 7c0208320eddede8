"""JupyterLab in a headless Chromium, driven by keyboard and menus: notebooks of this project in a folder of their own.

    python tests/lab.py docs/screenshots [RUN]  # from runs on the embedded digits, some minutes; of a study that is
                                                # there, such as `make demo-all` leaves, less
"""
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import nbformat

from vitlab.workbench.notebooks import NOTEBOOKS, declared

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--force-color-profile=srgb"]
NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT = 300                      # seconds for a notebook to run, and for the server to answer
SERVER = "from vitlab.workbench.notebooks import import_nbformat\nimport_nbformat()\n" \
         "from jupyterlab.labapp import main\nmain()"
IDLE = "Python 3 (ipykernel) | Idle"
# of images, how many have more white pixels than others, or get a white ground from JupyterLab
WHITE = """images => images.filter(image => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 64, height: 64});
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 64, 64);
  const pixels = new Uint32Array(context.getImageData(0, 0, 64, 64).data.buffer);
  return image.matches(".jp-mod-light-background") || pixels.filter(pixel => pixel === 0xffffffff).length > 2048;
}).length"""


def missing() -> str:
    """What is not there to drive a browser with; "" where all is."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed"
    return "" if browser(
        ) else f"no browser: none of {', '.join(NAMES)} is on the path (Debian: apt-get install chromium)"


def browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def copies(folder: Path, run: Path, quick: bool, more: Mapping[str, Mapping[str, str]] = MappingProxyType({})
           ) -> list[str]:
    """The project's notebooks in `folder`, with `run` as their study and the parameters that `more` has for each by
    its name; their names, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook, known = nbformat.read(path, as_version=4), declared(path)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for name, value in (("run", str(run)), ("quick", quick), *more.get(path.stem, {}).items()):
            if name in known:
                cell.source = re.sub(rf"^({name}: \w+ = )[^#]*",
                                     rf"\g<1>{json.dumps(value) if isinstance(value, str) else value}  ", cell.source,
                                     flags=re.M)
        nbformat.write(notebook, folder / path.name)
    return [path.name for path in sorted(folder.glob("*.ipynb"))]


class Lab:
    """An open JupyterLab; `errors` are what the page's console said since the last `open`."""

    def __init__(self, page: Any, url: str, token: str, root: Path) -> None:
        self.page, self.url, self.token, self.root, self.errors = page, url, token, root, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def _ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method,
                                         headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.loads(answer.read() or "null")

    def open(self, name: str) -> None:
        """One notebook, with a kernel that answers; those open before are shut down."""
        for session in self._ask("sessions"):
            self._ask(f"sessions/{session['id']}", "DELETE")
        self.errors.clear()
        self.name = name
        self.page.goto(f"{self.url}/lab/tree/{name}?reset&token={self.token}", wait_until="domcontentloaded")
        self.page.locator(".jp-Notebook").first.wait_for(timeout=180_000)
        self.page.get_by_text(IDLE).wait_for(timeout=300_000)

    def run_all(self) -> list[Any]:
        """Run all cells; the code cells as they are saved afterwards."""
        prompts, end, asked = self.page.locator(".jp-CodeCell .jp-InputPrompt"), time.monotonic() + WAIT, 0.0
        while time.monotonic() < end:
            shown = prompts.all_inner_texts()
            # a Run given before the kernel's channel settles is dropped
            if set(shown) == {"[ ]:"} and time.monotonic() - asked > 6:
                self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
                self.page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
                asked = time.monotonic()
            elif asked and "[*]:" not in shown and set(shown) != {"[ ]:"}:
                break                                           # to the end, or to a cell that failed
            self.page.wait_for_timeout(500)
        self.page.wait_for_timeout(1000)                        # what was shown last is drawn
        saved = self.root / self.name
        before = saved.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        while time.monotonic() < end:
            self.page.wait_for_timeout(200)
            changed = saved.stat().st_mtime_ns != before
            with contextlib.suppress(nbformat.reader.NotJSONError):         # half of it is written
                cells = nbformat.read(saved, as_version=4).cells
                if changed:
                    break
        return [cell for cell in cells if cell.cell_type == "code"]

    def pictures(self) -> list[str]:
        """Where the pictures of the notebook's widgets come from, in order; a new picture has a new address."""
        return [image.get_attribute("src") for image in self.page.locator(".jp-OutputArea .jupyter-widgets img").all()]

    def slider(self, label: str) -> Any:
        """The handle of the first slider whose label begins so."""
        return self.page.locator(".jp-OutputArea .widget-hslider",
                                 has_text=re.compile(f"^{label}")).first.locator(".noUi-handle")

    def press(self, handle: Any, key: str, times: int) -> bool:
        """Whether some picture is another one after a key was pressed on a widget."""
        before = self.pictures()
        handle.focus()
        for _ in range(times):
            self.page.keyboard.press(key)
        for _ in range(100):
            self.page.wait_for_timeout(100)
            if self.pictures() != before:
                self.page.wait_for_timeout(500)
                return True
        return False

    def menus(self) -> list[Any]:
        """Those of the widgets that are seen and have something to choose from."""
        return [menu for menu in self.page.locator(".jp-OutputArea .widget-dropdown select").all()
                if menu.is_visible() and menu.locator("option").count() > 1]

    def chosen_by_keys(self, menu: Any) -> bool:
        """Whether an arrow key chooses another entry, and leaves the notebook, as a letter does, where and as it is."""
        cells, seen = self.page.locator(".jp-Cell").count(), {menu.input_value()}
        menu.focus()
        for key in ("ArrowDown", "ArrowUp", "x"):               # "x" would cut the cell
            self.page.keyboard.press(key)
            self.page.wait_for_timeout(500)
            seen.add(menu.input_value())
        return len(seen) > 1 and self.page.locator(".jp-Cell").count() == cells

    def slabs(self) -> int:
        """How many pictures are white for more than a half; on a dark page these are what is seen of it."""
        return self.page.locator(".jp-OutputArea img").evaluate_all(WHITE)

    def shot(self, code: str, path: Path) -> None:
        """A screenshot of what the last cell with this code shows, and a margin around it."""
        output = self.page.locator(".jp-CodeCell", has_text=code).last.locator(".jp-OutputArea-output").last
        output.evaluate("output => output.style.padding = '12px'")
        output.scroll_into_view_if_needed()
        self.page.wait_for_timeout(500)
        output.screenshot(path=path)


@contextlib.contextmanager
def lab(root: Path) -> Iterator[Lab]:
    """JupyterLab on `root`, with settings of its own, and a browser on it; both are gone afterwards."""
    from playwright.sync_api import sync_playwright
    with contextlib.ExitStack() as stack:
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        # all cells are there to look at
        for name, setting in (("notebook-extension/tracker", '{"windowingMode": "none"}'),
                              ("apputils-extension/notification", '{"fetchNews": "false"}')):
            path = own / f"lab/@jupyterlab/{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(setting)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, token = free.getsockname()[1], secrets.token_hex()
        folders = {"CONFIG_DIR": own, "DATA_DIR": own / "data", "LAB_SETTINGS_DIR": own / "lab",
                   "LAB_WORKSPACES_DIR": own / "ws"}
        env = {**os.environ,
               **{f"JUPYTER{'' if name.startswith('LAB') else '_'}{name}": str(path) for name, path in folders.items()},
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
             "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            env=env, stdout=(own / "log").open("w"), stderr=subprocess.STDOUT)
        stack.callback(server.wait, WAIT)
        stack.callback(server.terminate)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
        while True:
            try:
                urllib.request.urlopen(f"{url}/login", timeout=2)
                break
            except OSError:
                if time.monotonic() > end or server.poll() is not None:
                    raise RuntimeError(f"JupyterLab does not answer:\n{(own / 'log').read_text()[-2000:]}") from None
                time.sleep(0.3)
        play = stack.enter_context(sync_playwright())
        context = play.chromium.launch_persistent_context(str(own / "profile"), executable_path=browser(),
                                                          headless=True, args=FLAGS,
                                                          viewport={"width": 1400, "height": 1300})
        stack.callback(context.close)
        yield Lab(context.pages[0] if context.pages else context.new_page(), url, token, root)


def screenshots(out: Path, run: Path | None = None) -> None:
    """The explorers of the notebooks on a study, or one made for it, into out/NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copies(root, root / "run" if run is None else run.resolve(), quick=False)
        with lab(root) as opened:
            for name in VIEWS:
                print(name, flush=True)
                opened.open(name)
                opened.run_all()
                for code, view in VIEWS[name]:
                    if view in ("token_map", "heads_and_neurons"):
                        widgets = opened.page.locator(".jp-CodeCell", has_text=code).last
                        widgets.locator("select").first.select_option("china")
                        if view == "token_map":         # the last block merges most
                            opened.slider("block").focus()
                            opened.page.keyboard.press("End")
                        opened.page.wait_for_timeout(2000)
                    opened.shot(code, out / f"{view}.png")


# What each notebook shows: (code of the cell, name of the screenshot).
VIEWS = {"01_baseline.ipynb": [], "02_token_scores.ipynb": [],
         "03_prune_and_merge.ipynb": [("token_map(dense", "token_map")], "04_finetune.ipynb": [("runs_panel(", "runs")],
         "05_heads_and_neurons.ipynb": [("units_map(dense", "heads_and_neurons")],
         "06_search.ipynb": [("study_explorer(study", "search"), ("plan_explorer({", "plans")],
         "07_prune_what_was_found.ipynb": [], "09_segmentation.ipynb": [("scene_view(dense", "scene_view")],
         "11_what_changed.ipynb": [("changes_explorer(found", "changes")]}

if __name__ == "__main__":
    screenshots(*map(Path, sys.argv[1:3]))
