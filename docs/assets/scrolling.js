/* Tables that are wider than the page scroll, so the keyboard has to reach them; the copy buttons' frames are no landmarks. */
(() => {
  const look = () => {
    for (const one of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset table:not([class])")) {
      if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
      else one.removeAttribute("tabindex");
    }
    for (const one of document.querySelectorAll("nav.md-code__nav:not([role])")) one.setAttribute("role", "none");
  };
  const main = document.querySelector("main");
  if (!main) return;
  new MutationObserver(look).observe(main, { childList: true, subtree: true });
  addEventListener("resize", look);
  addEventListener("load", look);
  look();
})();
