"""The Space: serves the page for the model in this folder. `python app.py`, then open what it prints."""

from space.server import main

if __name__ == "__main__":
    main()
