"""A model and a picture -> docs/page.png: the server's page in headless Chromium, at one token of an answer.

    python benchmarks/page.py runs/demo/model runs/demo/images/5.png docs/page.png

Needs Chromium (`apt-get install chromium`) and the package playwright.
"""

import re
import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright

QUESTION, TOKEN = "describe the image.", 9


def main(model: str, picture: str, out: str):
    command = [sys.executable, "-m", "nanovlm.serve", model, "--name", "runs/demo/model", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address, "the server did not start"
        with sync_playwright() as run:
            browser = run.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 740})
            page.goto(address[0])
            page.locator("#pictures").set_input_files(picture)
            page.locator("#question").fill(QUESTION)
            page.keyboard.press("Enter")
            page.locator(".token").nth(TOKEN).hover()
            page.screenshot(path=out)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
