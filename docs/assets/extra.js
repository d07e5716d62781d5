// Let the keyboard reach tables that are wider than the page.
document$.subscribe(() => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    table.tabIndex = 0
  }
})
