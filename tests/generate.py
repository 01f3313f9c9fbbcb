"""Write the generated parts of docs/: python tests/generate.py. tests/test_site.py holds that they are up to date."""

import command_pages
import config_pages
import error_pages


def pages():
    """Path of a page -> its text as generated now."""
    made = (command_pages, config_pages, error_pages)
    return {module.PAGE: module.page() for module in made}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
