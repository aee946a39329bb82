"""How the page of `faultline reproduce` looks: on a screen of any width, in light and in dark, and on paper. Verdicts are told by a word and a mark; colour only helps."""

from jobs.claims import NOT, REPRODUCED, UNDECIDED, UNTESTABLE

MARKS = {REPRODUCED: ("\u2713", "yes"), NOT: ("\u2717", "no"), UNDECIDED: ("?", "unclear"), UNTESTABLE: ("\u25cb", "open")}  # mark, class of style

STYLE = """
:root { color-scheme: light dark; --ink: #1d1c1a; --faint: #66625b; --paper: #fbfaf7; --card: #fff; --line: #ddd8ce; --yes: #1f6b3a; --no: #a8320b; --unclear: #735600; --open: #5c5850; --link: #1b5e9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9e6df; --faint: #a7a299; --paper: #181715; --card: #211f1d; --line: #3a3733; --yes: #7fcf98; --no: #ff9d77; --unclear: #e3c46b; --open: #b9b3a8; --link: #8fc1f0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: auto; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.9rem, 1.2rem + 3.2vw, 3.2rem); line-height: 1.1; letter-spacing: -0.02em; margin: 0.2rem 0 1rem; text-wrap: balance; }
h2 { font-size: clamp(1.3rem, 1.1rem + 1vw, 1.7rem); line-height: 1.2; margin: 0 0 0.9rem; letter-spacing: -0.01em; }
section { margin-top: 3.5rem; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 0.2em; }
a:hover { color: var(--link); text-decoration-color: currentColor; }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 3px; border-radius: 2px; }
.kicker { margin: 0 0 0.3rem; color: var(--faint); font-size: 0.9rem; }
.lead { max-width: 62ch; font-size: 1.1rem; }
.tally { list-style: none; display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 1.6rem 0; padding: 0; }
.tally .verdict { white-space: normal; overflow-wrap: normal; line-height: 1.25; }
.tally li { flex: 1 1 6rem; min-width: 0; display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--open); border-radius: 6px; padding: 0.7rem 1rem 0.8rem; }
.tally li.yes { border-top-color: var(--yes); } .tally li.no { border-top-color: var(--no); border-top-style: dashed; } .tally li.unclear { border-top-color: var(--unclear); border-top-style: double; } .tally li.open { border-top-style: dotted; }
.tally b { font-size: 2.2rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0.8rem 2rem; margin: 1.8rem 0; }
dl div { min-width: 0; } dt { color: var(--faint); font-size: 0.85rem; } dd { margin: 0; }
code { font: 0.86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0.3rem 0 0; padding: 0.8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--faint); font-size: 0.85rem; padding-bottom: 0.3rem; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: 0.75rem 1rem 0.75rem 0; border-top: 1px solid var(--line); font-weight: 400; }
thead th { color: var(--faint); font-size: 0.85rem; padding: 0.3rem 1rem 0.3rem 0; border-top: 0; }
.sets { max-width: 44rem; } .sets th, .sets td { padding-block: 0.35rem; }
.claims th[scope=row] { width: 35%; } .claims td { font-size: 0.94rem; } .claims td:nth-child(2) { width: 23%; } .claims td:nth-child(4) { width: 19%; padding-right: 0; }
.claims a { font-weight: 600; text-decoration: none; } .claims a:hover { text-decoration: underline; } .text { display: block; font-size: 0.94rem; }
.place { display: block; color: var(--faint); font-size: 0.82rem; }
.verdict { font-weight: 650; white-space: nowrap; } .verdict.yes { color: var(--yes); } .verdict.no { color: var(--no); } .verdict.unclear { color: var(--unclear); } .verdict.open { color: var(--open); }
.range { white-space: nowrap; }
.why { display: block; color: var(--faint); font-size: 0.88rem; } .none { color: var(--faint); }
tr:target th, tr:target td { background: var(--card); }
.told { list-style: none; padding: 0; margin: 0 0 1rem; } .told li { margin: 0.2rem 0; } .told .verdict { margin-right: 0.4rem; }
.found { max-width: 80ch; padding-left: 1rem; border-left: 3px solid var(--line); }
.missing { max-width: 80ch; padding: 0.8rem 1rem; border: 1px dashed var(--open); border-radius: 6px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; align-items: start; margin: 1.4rem 0; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: 0.4rem; }
figcaption { color: var(--faint); font-size: 0.88rem; margin-top: 0.4rem; }
details, .aside { color: var(--faint); font-size: 0.92rem; margin: 0.8rem 0; } summary { cursor: pointer; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--faint); font-size: 0.88rem; } footer p { max-width: 80ch; }
@media (max-width: 46rem) {
  .tally { gap: 0.5rem; } .tally li { padding: 0.5rem 0.6rem 0.6rem; font-size: 0.8rem; } .tally b { font-size: 1.7rem; }
  .claims thead, .sets thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .claims, .claims tbody, .claims tr, .claims th[scope=row], .claims td, .claims td:nth-child(n), .sets, .sets tbody, .sets tr, .sets th, .sets td { display: block; width: auto; }
  .claims tr, .sets tr { border: 1px solid var(--line); border-left: 4px solid var(--open); border-radius: 6px; background: var(--card); padding: 0.8rem 1rem; margin: 0 0 0.8rem; }
  .claims tr.yes { border-left-color: var(--yes); } .claims tr.no { border-left-color: var(--no); border-left-style: dashed; } .claims tr.unclear { border-left-color: var(--unclear); border-left-style: double; } .claims tr.open { border-left-style: dotted; }
  .claims th, .claims td, .sets th, .sets td { border: 0; padding: 0.15rem 0; }
  .claims td::before, .sets td::before { content: attr(data-label) ": "; color: var(--faint); font-size: 0.85rem; }
  .claims td[data-label=verdict]::before { content: none; }
  .sets caption { display: block; } .sets tr { border-left-width: 1px; } .sets td { display: inline-block; margin-right: 1rem; }
}
@media print {
  :root { --ink: #000; --faint: #444; --paper: #fff; --card: #fff; --line: #bbb; --yes: #000; --no: #000; --open: #000; color-scheme: light; }
  html { font-size: 9.5pt; } body { max-width: none; padding: 0; } section { margin-top: 1.8rem; } section:first-of-type { break-before: page; margin-top: 0; } figure, tr, .tally li { break-inside: avoid; } h2, .kicker { break-after: avoid; }
  a { text-decoration: none; } details { display: none; } .figures { grid-template-columns: 1fr 1fr; }
}
"""
