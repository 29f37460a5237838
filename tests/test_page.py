"""The page of the second port, in a real browser: what a person sees of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Page, async_playwright, expect

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, charger
from tests.test_status import PASSWORD, watched

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
# A browser that asks nobody for anything, in a sandbox or not.
QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
MILLISECONDS = 1000.0

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the gate installs one"),
    # Of the driver, which is another process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@asynccontextmanager
async def seen(
    status: p.Status, width: int = 1200, height: int = 900, password: str = "", outage: str = ""
) -> AsyncIterator[Page]:
    """The page in a browser; nothing that it logs, asks others for, or is forbidden goes unnoticed.

    But for what the browser itself logs of an outage that the test makes.
    """
    complaints: list[str] = []
    requests: list[str] = []
    here = f"http://127.0.0.1:{status.port}/"
    login = {"username": "me", "password": password}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = await browser.new_page(
            viewport={"width": width, "height": height},
            http_credentials=login if password else None,  # type: ignore[arg-type]
        )
        page.set_default_timeout(PATIENCE * MILLISECONDS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        await page.goto(here)
        try:
            yield page
        finally:
            await browser.close()
    assert [text for text in complaints if not (outage and outage in text)] == []
    assert [url for url in requests if not url.startswith(here)] == []


async def shows(page: Page, table: str, text: str) -> None:
    """Wait until a table shows a text."""
    await expect(page.locator(f"#{table}")).to_contain_text(text, timeout=PATIENCE * MILLISECONDS)


async def test_a_session_appears_while_it_runs() -> None:
    """From the charger that comes online to the session that is delivered, without a reload."""
    async with watched() as (status, *_), seen(status) as page:
        await shows(page, "chargers", "None yet.")
        async with charger(status.proxy) as cp:
            await cp.boots()
            await shows(page, "chargers", "CP1")
            await shows(page, "summary", "1 of 1 chargers online")
            await shows(page, "chargers", "connected")
            number = await cp.starts("SECO1234")
            await shows(page, "open", "****1234")
            reading = [{"timestamp": "2026-01-01T00:00:00Z", "sampledValue": [{"value": "1500"}]}]
            await cp.calls("m", "MeterValues", connectorId=1, transactionId=number, meterValue=reading)
            await shows(page, "open", "1.50")
            await cp.calls("e", "StopTransaction", transactionId=number, meterStop=2500, timestamp="x")
            await shows(page, "open", "None.")
            await shows(page, "sessions", "delivered")
            await shows(page, "sessions", "2.50")
            await shows(page, "energy", "2.5")
            await shows(page, "events", "CP1: charger connected")
        await shows(page, "chargers", "offline")


async def test_what_comes_from_outside_is_text() -> None:
    """A badge and a server's words that look like markup do nothing but stand there."""
    evil = "<img src=x onerror=alert(1)>"
    async with watched() as (status, _, _, secondary), seen(status) as page:
        secondary.refusal = (401, {})
        async with charger(status.proxy, "a|@+b") as cp:
            await cp.calls("a", "Authorize", idTag=evil)
            await cp.starts(evil)
            await shows(page, "unlisted", evil)
            await shows(page, "chargers", "a|@+b")
            await shows(page, "chargers", "down: HTTP 401 Unauthorized; next try in")
            assert await page.locator("img").count() == 0


async def test_a_badge_that_somebody_marks_stays_marked() -> None:
    """To be copied, while the page goes on."""
    async with watched() as (status, *_), seen(status) as page, charger(status.proxy) as cp:
        await cp.calls("a", "Authorize", idTag="04A1B2C3D4")
        await shows(page, "unlisted", "04A1B2C3D4")
        await page.click("#unlisted .copy")
        await cp.starts("PRIM1")
        await shows(page, "open", "PRIM1" if status.proxy.config.full_badges else "****")
        assert await page.evaluate("String(getSelection())") == "04A1B2C3D4"


async def test_a_person_finds_one_of_many_chargers() -> None:
    """By a part of its id."""
    async with watched() as (status, *_), seen(status) as page:
        async with charger(status.proxy, "HOME-1"), charger(status.proxy, "WORK-1"):
            await shows(page, "chargers", "HOME-1")
            await shows(page, "chargers", "WORK-1")
            await page.fill("#filter", "work")
            await expect(page.locator("#chargers")).not_to_contain_text("HOME-1")
            await shows(page, "chargers", "WORK-1")


async def test_the_page_fits_a_phone() -> None:
    """Nothing has to be pushed sideways."""
    async with watched() as (status, *_), seen(status, width=360, height=740) as page:
        async with charger(status.proxy, "A-CHARGER-WITH-A-VERY-LONG-NAME-INDEED-NO-DOUBT") as cp:
            await cp.starts("X" * 100)
            await shows(page, "unlisted", "X" * 100)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_the_page_tells_of_trouble_and_comes_back_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk fails, and when the proxy was away; also where it takes a password."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, proxy, *_):
        async with seen(status, password=PASSWORD, outage="ERR_CONNECTION_REFUSED") as page:
            await shows(page, "chargers", "None yet.")
            with monkeypatch.context() as full:
                full.setattr(proxy.journal, "_write", lambda _: "disk full")
                proxy.journal.memory("CP2")  # Something to save.
                await shows(page, "alarm", "the state file cannot be written: disk full")
            await expect(page.locator("#alarm")).to_be_hidden()
            status.stop()
            await shows(page, "alarm", "The proxy does not answer")
            await status.start()
            async with charger(proxy):
                await shows(page, "chargers", "CP1")
            await expect(page.locator("#alarm")).to_be_hidden()
