"""The Space: serves the page for the model in this folder. `python app.py`, then open what it prints."""

from gpt2.kernels import library

library.start_build()  # compiles beside the imports, which take seconds

from space.server import main  # noqa: E402

if __name__ == "__main__":
    main()
