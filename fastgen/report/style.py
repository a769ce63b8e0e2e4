"""Colours and type of a report.

Colours of recipes are Okabe and Ito's, told apart by colour-blind readers, a shade darker on white and lighter on
black; those of generations are steps of viridis. Text has a contrast of 4.5 or more (WCAG 2.2 AA) on either ground.
"""

from __future__ import annotations

from fastgen.report.document import Colour

RECIPES: tuple[Colour, ...] = ("c0", "c1", "c2", "c3", "c4", "c5", "c6")
MARKERS = "osD^vPX"
# Name -> on white, on black. Figures are drawn with the first; the page puts a variable in its place.
_NAMED: dict[Colour, tuple[str, str]] = {
    "ground": ("#ffffff", "#12161c"),
    "raised": ("#f5f7fa", "#1a2029"),
    "ink": ("#1c2128", "#e7ebf0"),
    "muted": ("#56606e", "#a3adba"),
    "line": ("#d6dce4", "#323b47"),
    "accent": ("#0b5cad", "#7db8f2"),
    "c0": ("#0a69a8", "#56b0ea"),
    "c1": ("#c4500a", "#f08a4b"),
    "c2": ("#00805c", "#3ec79c"),
    "c3": ("#a84f86", "#e29ac4"),
    "c4": ("#a87000", "#e9b949"),
    "c5": ("#3f8fc0", "#9bd3f5"),
    "c6": ("#4a4f57", "#c9ced6"),
}
MOST_STEPS = 12
# From dark to light on white, from light to dark on black: the last generation is the palest on either.
_ON_WHITE, _ON_BLACK = (0.0, 0.82), (1.0, 0.38)


def recipe_colour(number: int) -> Colour:
    """Of the n-th recipe."""
    return RECIPES[number % len(RECIPES)]


def generation_colour(number: int, count: int) -> Colour:
    """Of the n-th generation of so many: the whole range for few as for many."""
    return f"g{round(number * (MOST_STEPS - 1) / max(count - 1, 1))}"


def palette() -> dict[Colour, tuple[str, str]]:
    """Name -> colour on white, and on black."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    steps = {}
    for step in range(MOST_STEPS):
        share = step / (MOST_STEPS - 1)
        light, dark = (
            to_hex(colormaps["viridis"](first + share * (last - first))) for first, last in (_ON_WHITE, _ON_BLACK)
        )
        steps[f"g{step}"] = light, dark
    return _NAMED | steps


def sheet() -> str:
    """The page's style sheet."""
    colours = palette()
    light = "".join(f"--{name}:{colour};" for name, (colour, _) in colours.items())
    dark = "".join(f"--{name}:{colour};" for name, (_, colour) in colours.items())
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{color-scheme:light;{light}}}}}\n{_RULES}"
    )


_RULES = """
*,*::before,*::after{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:40px}
h1{font-size:clamp(1.55rem,1.1rem + 2vw,2.2rem);line-height:1.2;letter-spacing:-.015em;margin:0 0 6px}
h2{font-size:1.35rem;line-height:1.3;letter-spacing:-.01em;margin:56px 0 14px;padding-top:14px;
 border-top:1px solid var(--line)}
h3{font-size:1rem;line-height:1.4;margin:32px 0 8px}
p,ul{margin:0 0 14px;max-width:74ch}
ul{padding-left:1.2em}
li{margin:0 0 6px}
a{color:var(--accent)}
strong{font-weight:700}
h1,h2,h3,p,li,figcaption,caption,code,.facts{overflow-wrap:anywhere}
.facts{color:var(--muted);margin:0 0 22px}
.headline{background:var(--raised);border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:8px;
 padding:20px 22px 8px;margin:0 0 22px}
.headline p{font-size:1.2rem;line-height:1.45;margin-bottom:14px}
.headline ul{color:var(--muted);font-size:.92rem;max-width:none}
.headline li strong{color:var(--ink)}
nav{margin:0 0 8px;display:flex;flex-wrap:wrap;gap:6px 18px;font-size:.92rem}
nav a{text-decoration:none}
nav a:hover,nav a:focus{text-decoration:underline}
/* A shade at an edge behind which a table goes on: covers that scroll with the table hide it at the table's ends. */
.scroll{overflow-x:auto;margin:0 0 8px;-webkit-overflow-scrolling:touch;background:
 linear-gradient(to right,var(--ground) 50%,transparent) left/36px 100% no-repeat local,
 linear-gradient(to left,var(--ground) 50%,transparent) right/36px 100% no-repeat local,
 linear-gradient(to right,var(--line),transparent) left/18px 100% no-repeat scroll,
 linear-gradient(to left,var(--line),transparent) right/18px 100% no-repeat scroll}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.table{margin:22px 0 30px}
.note{color:var(--muted);font-size:.88rem;line-height:1.5;max-width:84ch;margin:0 0 8px}
table{border-collapse:collapse;font-size:.88rem;line-height:1.4;font-variant-numeric:tabular-nums;min-width:100%}
thead th{border-bottom:1.5px solid var(--ink);border-top:1.5px solid var(--ink);font-weight:600;vertical-align:bottom}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;vertical-align:top}
th.text,td.text{text-align:left;font-weight:400}
thead th.text{font-weight:600}
th.name{white-space:normal;overflow-wrap:anywhere;min-width:9.5em;max-width:22em;position:sticky;left:0;background:var(--ground)}
tbody tr.first>*{border-top:1px solid var(--line)}
tbody tr:first-child>*{border-top:0}
tbody .last{border-bottom:1.5px solid var(--ink)}
figure{margin:22px 0 34px}
figcaption{color:var(--muted);font-size:.88rem;line-height:1.5;max-width:84ch;margin-top:8px}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:0 0 8px;max-width:none;font-size:.88rem}
.keys li{display:flex;align-items:center;gap:8px;margin:0}
.keys svg{flex:none;width:30px;height:12px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:18px 22px}
.panels svg{display:block;width:100%;max-width:520px;height:auto}
.panels.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:18px 22px;margin:0 0 26px}
.sample{margin:0;padding:14px;border:1px solid var(--line);border-radius:8px;display:grid;
 grid-template-columns:96px minmax(0,1fr);grid-template-rows:auto 1fr;gap:4px 14px;break-inside:avoid}
.sample img{grid-row:1/3;width:96px;height:96px;object-fit:contain;border-radius:4px;background:var(--raised)}
.sample img.small{image-rendering:pixelated}
.sample .label{margin:0;font-size:.92rem}
.sample .label span{color:var(--muted)}
.answers{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:10px 16px}
.answers h4{margin:4px 0 2px;font-size:.8rem;font-weight:600;color:var(--muted)}
.answers ol{list-style:none;margin:0;padding:0;font-size:.82rem;line-height:1.35}
.answers li{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:0 8px;margin:0 0 3px}
.answers li span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.answers .bar{grid-column:1/-1;height:3px;border-radius:2px;background:var(--line)}
.answers .bar i{display:block;height:3px;border-radius:2px;background:var(--muted)}
.answers .right .bar i{background:var(--accent)}
.answers .right span:first-child::before{content:"\\2713\\00a0";color:var(--accent)}
pre{background:var(--raised);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow-x:auto;
 font-size:.82rem;line-height:1.5;margin:0 0 14px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
code span{display:inline-block;max-width:100%}
p code,li code{font-size:.88em;background:var(--raised);border-radius:4px;padding:1px 4px}
summary{cursor:pointer;font-weight:600;margin:0 0 8px}
footer{color:var(--muted);font-size:.85rem;padding-top:8px;padding-bottom:40px}
@media (max-width:560px){
 main,header,footer{padding-left:14px;padding-right:14px}
 header{padding-top:24px}
 .headline{padding:16px 16px 4px}
 .headline p{font-size:1.08rem}
 th.name{max-width:9.5em;min-width:7em}
 .sample{grid-template-columns:56px minmax(0,1fr)}
 .sample img{width:56px;height:56px;grid-row:auto}
 .sample .label{align-self:center}
 .answers{grid-column:1/-1}
}
@media print{
 html{font-size:10.5pt}
 body{font-size:1rem}
 .panels,.panels.two{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px 12px}
 .samples{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
 main,header,footer{max-width:none;padding:0}
 nav{display:none}
 h2{margin-top:28px;break-after:avoid}
 h3{break-after:avoid}
 .scroll{overflow:visible;background:none}
 table{font-size:.74rem}
 th,td{padding:3px 5px}
 th.name{position:static}
 figure,.table,tr,.headline{break-inside:avoid}
 pre{white-space:pre-wrap;overflow-wrap:anywhere}
 .panels svg{max-width:none}
 details::details-content{content-visibility:visible;display:block;block-size:auto}
}
"""
