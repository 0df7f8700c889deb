// Open a report in a real Chromium, as phone, desktop and print, light and dark, and say what is wrong. Called by check_report.sh.
// usage: node check_report.mjs PLAYWRIGHT CHROMIUM PAGE SHOTS
import { createRequire } from "node:module";
import { mkdirSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [playwright, executablePath, page_path, shots] = process.argv.slice(2);
const { chromium } = createRequire(import.meta.url)(playwright);
const FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split(" ");
const WIDTHS = { phone: 390, desktop: 1280, print: 718 }; // print: A4 less its margins
const problems = [];
const say = (where, what) => problems.push(`${where}: ${what}`);

// Everything below runs in the page.
function overflow() {
  const clips = (node) => node && (/(auto|scroll|hidden)/.test(getComputedStyle(node).overflowX) || clips(node.parentElement));
  const bad = [];
  if (document.documentElement.scrollWidth > innerWidth + 1) bad.push(`the page is ${document.documentElement.scrollWidth} wide`);
  for (const node of document.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (box.width && box.right > innerWidth + 1 && !node.closest("svg > *, .skip, .unseen") && !clips(node.parentElement)) bad.push(`${node.tagName} ${node.id || node.className} ends at ${Math.round(box.right)}`);
  }
  return bad.slice(0, 5);
}

function overlaps() {
  const blocks = [...document.querySelectorAll("h1, h2, body p, table, figcaption, figure svg, summary, nav li, dt, dd")];
  const seen = blocks.map((node) => [node, node.getBoundingClientRect()]).filter(([node, box]) => node.checkVisibility() && box.width > 1 && box.height > 1);
  const bad = [];
  seen.forEach(([one, a], place) => {
    for (const [other, b] of seen.slice(place + 1)) {
      if (one.contains(other) || other.contains(one)) continue;
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      const isHidden = one.closest(".wide") !== other.closest(".wide") && (a.right > innerWidth || b.right > innerWidth);
      if (width > 1 && height > 1 && !isHidden) bad.push(`${one.tagName} "${one.textContent.trim().slice(0, 30)}" over ${other.tagName} "${other.textContent.trim().slice(0, 30)}"`);
    }
  });
  return bad.slice(0, 5);
}

function contrast(least) {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const back = (node) => { const colour = rgba(getComputedStyle(node).backgroundColor); return colour[3] === 255 || !node.parentElement ? colour : back(node.parentElement); };
  const bad = new Set();
  for (const node of document.body.querySelectorAll("*")) {
    if (node.closest("svg, script") || ![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
    const [a, b] = [light(rgba(getComputedStyle(node).color)), light(back(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least) bad.add(`${node.tagName}.${node.className} ${ratio.toFixed(2)}`);
  }
  return [...bad].slice(0, 5);
}

async function sorting(page, where) {
  const button = page.locator("table:visible thead button").first();
  if (!(await button.count())) return say(where, "no table can be sorted");
  await page.keyboard.press("Tab");
  if ((await page.evaluate(() => document.activeElement.className)) !== "skip") say(where, "the first Tab does not reach the link to the report");
  await button.focus();
  await page.keyboard.press("Shift+Tab");
  await page.keyboard.press("Tab");
  if (!(await button.evaluate((node) => node === document.activeElement && parseFloat(getComputedStyle(node).outlineWidth) >= 2))) say(where, "a focused title has no outline");
  const cells = () => button.evaluate((node) => [...node.closest("table").tBodies[0].rows].map((row) => row.cells[node.parentElement.cellIndex].textContent));
  const state = () => button.evaluate((node) => node.parentElement.getAttribute("aria-sort"));
  const before = await cells();
  await page.keyboard.press("Enter");
  const up = await cells();
  if ((await state()) !== "ascending") say(where, `aria-sort is ${await state()} after Enter`);
  await page.keyboard.press("Space");
  const down = await cells();
  if ((await state()) !== "descending") say(where, `aria-sort is ${await state()} after Space`);
  if (new Set(before).size > 1 && up.join() === down.join()) say(where, "both directions give one order");
  if ([...before].sort().join() !== [...up].sort().join()) say(where, "sorting lost a row");
}

// Small pictures, for a page of documentation: the first screen of each section on a desktop, the first ones of the page on a phone.
async function small(page, name) {
  if (name === "phone") return page.screenshot({ path: `${shots}/small_phone.png` });
  for (const section of await page.locator("main > section").all()) {
    await section.scrollIntoViewIfNeeded();
    await section.evaluate((node) => node.scrollIntoView());
    await page.screenshot({ path: `${shots}/small_${await section.getAttribute("id")}.png`, clip: { x: 0, y: 0, width: 1280, height: 720 } });
  }
  await page.evaluate(() => scrollTo(0, 0));
}

mkdirSync(shots, { recursive: true });
const browser = await chromium.launch({ executablePath, args: FLAGS });
for (const [name, width] of Object.entries(WIDTHS)) {
  for (const colorScheme of name === "print" ? ["light"] : ["light", "dark"]) {
    const where = `${name} ${colorScheme}`;
    const page = await browser.newPage({ viewport: { width, height: name === "phone" ? 844 : 900 }, colorScheme });
    if (name === "print") await page.emulateMedia({ media: "print", colorScheme });
    page.on("console", (message) => ["error", "warning"].includes(message.type()) && say(where, `console: ${message.text()}`));
    page.on("pageerror", (error) => say(where, `script: ${error}`));
    page.on("request", (request) => !/^(file|data):/.test(request.url()) && say(where, `asks ${request.url()}`));
    page.on("dialog", async (dialog) => { say(where, `a dialog: ${dialog.message()}`); await dialog.dismiss(); });
    await page.goto(pathToFileURL(page_path).href);
    for (const what of await page.evaluate(overflow)) say(where, `overflow: ${what}`);
    for (const what of await page.evaluate(overlaps)) say(where, `overlap: ${what}`);
    for (const what of await page.evaluate(contrast, 4.5)) say(where, `contrast below 4.5: ${what}`);
    await page.screenshot({ path: `${shots}/${name}_${colorScheme}.png`, fullPage: true });
    if (name === "print") await page.pdf({ path: `${shots}/print.pdf`, format: "A4", margin: { top: "1cm", bottom: "1cm", left: "1cm", right: "1cm" } });
    if (where === "desktop light" || where === "phone dark") await small(page, name);
    if (name !== "print") {
      await sorting(page, where);
      await page.evaluate(() => document.querySelectorAll("details").forEach((node) => (node.open = true)));
      for (const what of await page.evaluate(overflow)) say(where, `overflow with all data open: ${what}`);
      for (const what of await page.evaluate(contrast, 4.5)) say(where, `contrast below 4.5 with all data open: ${what}`);
    }
    await page.close();
  }
}
await browser.close();
for (const problem of problems) console.log(problem);
console.log(problems.length ? `${problems.length} problems` : `no problem; screenshots in ${shots}`);
process.exit(problems.length ? 1 : 0);
