"""``python -m rkl_kernels``: what is built here, what is usable, and why the rest is not."""

from . import __version__, backends


def main() -> None:
    print(f"rkl_kernels {__version__}")
    for name, status in backends().items():
        print(f"  {name:<10} {'yes' if status.available else 'no ':<4} {status.reason}")


if __name__ == "__main__":
    main()
