"""How report.html looks, by day and by night. Text of a style sheet; nothing here runs."""

STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --ink: #1c1d22; --soft: #6b6f7b; --rule: #e6e6e3;
  --c0: #3b6fd4; --c1: #d9683c; --c2: #2e9c76; --c3: #9257c4; --c4: #c79a1e; --c5: #c9477f; }
@media (prefers-color-scheme: dark) { :root {
  --page: #15161a; --card: #1d1f25; --ink: #e9e9ec; --soft: #9a9eab; --rule: #30333c;
  --c0: #7aa5f5; --c1: #f0946b; --c2: #5fc9a3; --c3: #bb8ce4; --c4: #e3bf56; --c5: #ee86b2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 12px; }
header { display: block; }
.tile { display: inline-block; min-width: 118px; margin: 0 10px 10px 0; padding: 10px 16px;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span, small, figcaption div { color: var(--soft); font-size: 12.5px; }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
figure { margin: 0; padding: 14px 14px 6px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-weight: 600; }
figcaption div { font-weight: 400; text-align: right; }
figcaption span { margin-left: 12px; white-space: nowrap; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
figcaption span::before { content: ""; display: inline-block; width: 9px; height: 9px;
  margin-right: 5px; border-radius: 50%; background: var(--c); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
.grid { stroke: var(--rule); fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .18; } .dot { fill: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border-radius: 10px;
  font-variant-numeric: tabular-nums; border: 1px solid var(--rule); }
th, td { padding: 6px 16px; border-bottom: 1px solid var(--rule); text-align: right; }
tbody tr:last-child > * { border-bottom: 0; }
tbody th { text-align: left; font-weight: 500; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px; }
article { padding: 12px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; min-width: 0; overflow-wrap: anywhere; }
article img { display: block; width: 100%; height: 170px; object-fit: contain; }
article ol, article ul { max-height: 220px; overflow: auto; margin: 10px 0; padding: 0;
  font-size: 13.5px; }
article ol { padding-inline-start: 20px; } article ul { list-style: none; }
article p { margin: 0; color: var(--soft); font-size: 12.5px; }
li.right { color: var(--c2); font-weight: 600; }
pre { overflow: auto; max-height: 560px; margin: 0; padding: 14px 16px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; font-size: 12.5px; line-height: 1.45; }
"""
