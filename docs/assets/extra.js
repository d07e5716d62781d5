document$.subscribe(() => {
  // The keyboard reaches what is wider than the page, and the menu of a narrow screen.
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1
    }
  })
  for (const wide of document.querySelectorAll(".md-typeset__scrollwrap, math[display=block]")) {
    observer.observe(wide)
  }
  const drawer = document.querySelector("#__drawer")
  const label = document.querySelector(".md-header label[for=__drawer]")
  const button = document.createElement("button")
  button.className = `${label.className} menu`
  button.ariaLabel = "Menu"
  button.append(...label.childNodes)
  button.addEventListener("click", () => drawer.click())
  label.replaceWith(button)

  // Assistive technology learns what the search is, and that copy buttons are no navigation.
  document.querySelector(".md-search").ariaLabel = "Search"
  for (const buttons of document.querySelectorAll(".md-code__nav")) {
    buttons.role = "none"
  }
})
