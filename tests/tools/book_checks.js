// What a reader's browser shows wrong on this page: a list of sentences. See book_browser.py.
(async () => {
  const faults = [];
  const spelled = (drawn) => [...drawn.querySelectorAll("[data-c]")]
    .map((x) => String.fromCodePoint(parseInt(x.dataset.c, 16))).join("");
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;

  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
    if (!image.naturalWidth) faults.push(`image ${image.getAttribute("src")} is not shown`);
    if (/\.(svg|png|jpe?g|gif)$/i.test(image.alt))
      faults.push(`image ${image.getAttribute("src")} has a file name for its alt text`);
  }

  const unknown = 'mjx-container [data-mml-node="mtext"][fill="red"]'; // a macro, shown as it is
  for (const error of document.querySelectorAll(`[data-mjx-error], ${unknown}`))
    faults.push(`MathJax cannot read ${error.dataset.mjxError ?? spelled(error)}`);
  for (const math of document.querySelectorAll(".math:not(mjx-container .math)"))
    if (!math.querySelector("mjx-container")) faults.push(`no equation made of ${math.textContent}`);

  const texts = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
  const shown = new Map(); // characters by font
  const tex = /\\[()[\]]|\$\$|\\(frac|begin|end|left|right|mathcal|operatorname|theta|sigma)\b/;
  while (texts.nextNode()) {
    const { data, parentElement } = texts.currentNode;
    if (!data.trim() || parentElement.closest("script, style, noscript, mjx-assistive-mml")) continue;
    if (tex.test(data) && !parentElement.closest("pre, code")) faults.push(`raw TeX: ${data.trim()}`);
    const { fontStyle, fontWeight, fontFamily } = getComputedStyle(parentElement);
    const font = `${fontStyle} ${fontWeight} 24px ${fontFamily}`;
    if (!shown.has(font)) shown.set(font, new Set());
    for (const character of data) shown.get(font).add(character);
  }

  // A character that no font has is drawn like one that cannot exist.
  const canvas = new OffscreenCanvas(48, 48).getContext("2d", { willReadFrequently: true });
  const drawn = (character) => {
    canvas.clearRect(0, 0, 48, 48);
    canvas.fillText(character, 6, 34);
    return canvas.getImageData(0, 0, 48, 48).data.join();
  };
  for (const [font, characters] of shown) {
    canvas.font = font;
    const missing = new Set(["\u{10FFFF}", "\u{0378}", "\u{E0FFF}", " "].map(drawn));
    for (const character of characters)
      if (!/[\p{Z}\p{Cc}\p{Cf}\p{M}]/u.test(character) && missing.has(drawn(character)))
        faults.push(`no font has ${character} (U+${character.codePointAt(0).toString(16)}), ${font}`);
  }
  return faults;
})()
