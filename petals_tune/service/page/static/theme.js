// The scheme that was chosen in this browser. No module: it runs before the page is drawn.
document.documentElement.dataset.theme = localStorage.getItem("petals_tune.theme") ?? "system";
