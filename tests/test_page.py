"""The page of the second port, in a real browser: what a person sees of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from playwright.async_api import Page, async_playwright, expect

import ocpp_2w_proxy as p
from tests.play.peers import PATIENCE, charger
from tests.test_status import PASSWORD, blocking, booked, reads, watched

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
MILLISECONDS = 1000.0
NAMES = "primary_name = Home\nsecondary_name = Employer AG\n"

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the gate installs one"),
    # Of the driver, which is another process.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@asynccontextmanager
async def seen(
    status: p.Status, width: int = 1280, path: str = "", outage: str = "", is_dark: bool = False
) -> AsyncIterator[Page]:
    """The page in a browser; nothing that it logs (but for an outage), or asks others for, goes unnoticed."""
    complaints, requests = list[str](), list[str]()
    here = f"http://127.0.0.1:{status.config.port}/"
    login = {"username": "me", "password": PASSWORD}
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        page = await browser.new_page(
            viewport={"width": width, "height": 844},
            color_scheme="dark" if is_dark else "light",
            http_credentials=login if status.config.password else None,  # type: ignore[arg-type]
        )
        page.set_default_timeout(PATIENCE * MILLISECONDS)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        # It asks every 2 s; here more often, so that nobody waits for it.
        await page.add_init_script("const every = setInterval; window.setInterval = task => every(task, 100)")
        await page.goto(here + path)
        try:
            yield page
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
        finally:
            await browser.close()
    assert [text for text in complaints if not (outage and outage in text)] == []
    assert [url for url in requests if not url.startswith(here)] == []


async def shows(page: Page, place: str, *texts: str) -> None:
    """Wait until a place of the page shows texts."""
    for text in texts:
        await expect(page.locator(f"#{place}")).to_contain_text(text, timeout=PATIENCE * MILLISECONDS)


@pytest.mark.parametrize("width", [390, 1280])
async def test_an_empty_page_says_which_address_to_type_and_comes_back_by_itself(width: int) -> None:
    """Also where it takes a password; what is not there is not "loading"."""
    async with watched(status=f"password = {PASSWORD}\n") as (status, proxy, *_):
        async with seen(status, width, outage="net::ERR_") as page:
            await shows(page, "chargers", f"ws://127.0.0.1:{proxy.port}/")
            await shows(page, "sessions", "None yet.")
            await expect(page.locator("body")).not_to_contain_text("loading")
            await expect(page.locator("#trouble > *")).to_have_count(0)
            assert status.server is not None
            status.server.close()
            await shows(page, "summary", "The proxy does not answer")
            await status.start()
            async with charger(proxy):
                await shows(page, "summary", "1 of 1 chargers online")


@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (1280, True)])
async def test_a_session_appears_while_it_runs(width: int, is_dark: bool) -> None:
    """From the charger that comes online to the session that is delivered, without a reload."""
    async with watched(NAMES) as (status, *_), seen(status, width, is_dark=is_dark) as page:
        await shows(page, "summary", "0 of 0 chargers online")
        async with charger(status.proxy) as cp:
            await cp.boots()
            await shows(page, "summary", "1 of 1 chargers online")
            await shows(page, "chargers", "CP1", "Home connected", "Employer AG connected")
            await cp.calls("c", "StatusNotification", connectorId=1, errorCode="NoError", status="Charging")
            await shows(page, "chargers", "1: Charging")
            number = await cp.starts("SECO1234", when="x")
            await shows(page, "chargers", "Employer AG badge ****1234", "connector 1, open")
            await reads(cp, number, 1500)
            for place in ("chargers", "sessions", "months"):
                await shows(page, place, "1.50 kWh")
            await cp.stops("SECO1234", number, 2500)
            await shows(page, "sessions", "delivered", "2.50 kWh")
            await expect(page.locator("#chargers")).not_to_contain_text("kWh")
            await shows(page, "months", "2.50 kWh")
            await shows(page, "days", "Employer AG: 2.50 kWh")
        await shows(page, "chargers", "offline", "last seen")
        await shows(page, "events", "CP1: charger connected")
        dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(16, 20, 26)") == is_dark


@pytest.mark.parametrize("width", [390, 1280])
async def test_trouble_stands_first_with_what_to_do(width: int) -> None:
    """A server that is down, a session that was refused, a badge on no list."""
    async with watched(NAMES) as (status, _, _, secondary), seen(status, width) as page:
        secondary.answers = blocking(0)
        async with charger(status.proxy) as cp:
            await cp.boots()
            await cp.stops("SECO1234", await cp.starts("SECO1234"), 8400)
            await shows(page, "trouble", "Employer AG refuses the session of badge ****1234", "Ask who runs")
            await cp.calls("a", "Authorize", idTag="04A1B2C3D4")
            await shows(page, "trouble", "04A1B2C3D4", "Copy the number to primary_rfid or secondary_rfid")
            await page.click("#trouble .copy")
            await cp.starts("PRIM1", "other")
            await shows(page, "chargers", "Home badge ****")  # What is marked stays so meanwhile.
            assert await page.evaluate("String(getSelection())") == "04A1B2C3D4"
            await secondary.stop()
            await cp.starts("SECO5678", "again")
            await shows(
                page, "trouble", "Employer AG is down for 1 charger: nobody listens there.", "dialled"
            )
            await shows(page, "chargers", "nobody listens there; next try at", "1 message waits")
            above = "(id) => document.getElementById(id).getBoundingClientRect().top"
            assert await page.evaluate(above, "trouble") < await page.evaluate(above, "chargers")


async def test_what_comes_from_outside_is_text() -> None:
    """A badge and a server's words that look like markup do nothing but stand there."""
    evil = "<img src=x onerror=alert(1)>"
    async with watched(f"secondary_name = {evil}") as (status, *_), seen(status, 390) as page:
        async with charger(status.proxy, "a|@+b") as cp:
            await cp.calls("a", "Authorize", idTag=evil)
            await cp.starts(f"SECO{evil}")
            await shows(page, "trouble", evil)
            await shows(page, "chargers", "a|@+b", evil)
            await page.goto(f"http://127.0.0.1:{status.config.port}/report?month=2026-01")
            await expect(page.locator("h2")).to_have_text(f"{evil}: badge SECO{evil}")
            assert await page.locator("img").count() == 0


async def test_a_phone_shows_a_busy_house_on_a_few_screens() -> None:
    """Four at most, with 50 sessions and two chargers; more sessions and events if somebody wants them."""
    async with watched(NAMES) as (status, proxy, *_):
        for number in range(50):
            begun = time.time() - number * p.DAY / 2
            booked(
                proxy,
                ("GARAGE-1", "CARPORT-2")[number % 2],
                begun=begun,
                started_at=p.Instant(0.0, begun).text,
            )
        now = time.time()
        booked(proxy, "GARAGE-1", begun=now, touched=now, owner=None, server="", ended=None, stop="")
        async with charger(proxy, "GARAGE-1") as one, charger(proxy, "CARPORT-2") as other:
            for cp in (one, other):
                await cp.boots()
            async with seen(status, 390) as page:
                await shows(page, "chargers", "GARAGE-1", "CARPORT-2", "nobody yet badge ****1234")
                await expect(page.locator("#sessions > *")).to_have_count(10)
                assert await page.evaluate("document.documentElement.scrollHeight") <= 4 * 844
                await page.click("text=More sessions")
                await expect(page.locator("#sessions > *")).to_have_count(50)


async def test_a_fleet_can_be_searched_and_everything_reached_by_keyboard() -> None:
    """A charger is found by a part of its id; what has the focus is to be seen."""
    async with watched() as (status, proxy, *_):
        for number in range(12):
            booked(proxy, f"HOME-{number}")
        async with seen(status) as page:
            await shows(page, "chargers", "HOME-11")
            reached = []
            for _ in range(4):
                await page.keyboard.press("Tab")
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                assert await page.evaluate(outline) != "none"
                focus = "document.activeElement.textContent || document.activeElement.id"
                reached.append(await page.evaluate(focus))
            assert reached == ["find", "More sessions", "all as CSV", "this month to print"]
            await page.focus("#find")
            await page.keyboard.type("home-3")
            await expect(page.locator("#chargers > *")).to_have_count(1)
            await shows(page, "chargers", "HOME-3")
            await page.keyboard.type("x")
            await shows(page, "chargers", "No charger has such an id.")
            await page.focus("#more")
            await page.keyboard.press("Enter")
            await expect(page.locator("#sessions > *")).to_have_count(12)


async def test_a_report_fits_a4() -> None:
    """Printed, several hundred sessions have their heads on every page, and nothing is cut off."""
    async with watched() as (status, proxy, *_):
        for number in range(300):
            booked(proxy, "GARAGE-1", meter_start=9e8, meter_stop=9e8 + number)
        async with seen(status, 794, "report?month=2026-05") as page:  # The width of A4 at 96 dpi.
            await page.emulate_media(media="print")
            pages = (await page.pdf(prefer_css_page_size=True)).count(b"/Type /Page\n")
            assert 5 <= pages <= 20
