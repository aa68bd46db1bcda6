#!/usr/bin/env python3
"""Draws tests/pictures/dump.svg, the README's picture of --dump: what out/tcpproxy writes to a terminal while curl asks a web
server through it, as it comes, in the colours in which it comes. Usage, in the root of the repository: tests/pictures/dump.py"""
import html, http.server, os, pty, re, select, signal, subprocess, threading, time

LISTEN, SERVE = 8080, 8000
COMMAND = ["tcpproxy", str(LISTEN), f"localhost:{SERVE}", "--dump", "text", "-q"]
COLOURS = {"36": "#56c7d8", "33": "#e0b557"}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nhello, world\n")

    def log_message(self, *_):
        pass


def conversation():
    server = http.server.HTTPServer(("127.0.0.1", SERVE), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.execv("out/tcpproxy", COMMAND)
    time.sleep(0.5)
    subprocess.run(["curl", "-s", f"localhost:{LISTEN}"], check=True, timeout=10, stdout=subprocess.DEVNULL)
    text = b""
    while select.select([terminal], [], [], 1)[0]:
        text += os.read(terminal, 65536)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    return text.decode().replace("\r\n", "\n").removesuffix("\x1b[m").rstrip("\n").split("\n")


def picture(lines):
    width, step, left, top = 8.43, 19, 18, 62
    lines = ["\x1b[90m$ \x1b[m" + " ".join(COMMAND)] + lines
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]
    size = (round(2 * left + width * max(max(map(len, plain)), 76)), top + step * len(lines))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" viewBox="0 0 {size[0]} {size[1]}" '
           f'role="img" aria-label="{html.escape(" ".join(COMMAND))} in a terminal">',
           f'<rect x=".5" y=".5" width="{size[0] - 1}" height="{size[1] - 1}" rx="9" fill="#1b1f27" stroke="#6b7280"/>',
           *(f'<circle cx="{20 + 20 * i}" cy="20" r="6" fill="{c}"/>' for i, c in enumerate(["#e0605a", "#e0b557", "#62b866"])),
           '<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,monospace" font-size="14" fill="#d6dae2" '
           'xml:space="preserve" style="white-space:pre">']
    colour = ""
    for number, line in enumerate(lines):
        spans = []
        for part in re.split(r"(\x1b\[\d*m)", line):
            if code := re.fullmatch(r"\x1b\[(\d*)m", part):
                colour = COLOURS.get(code[1], "#8a93a3" if code[1] == "90" else "")
            elif part:
                spans.append(f'<tspan fill="{colour}">{html.escape(part)}</tspan>' if colour else html.escape(part))
        out.append(f'<text x="{left}" y="{top + step * number - 5}">{"".join(spans)}</text>')
    return "\n".join([*out, "</g>", "</svg>", ""])


with open("tests/pictures/dump.svg", "w", encoding="utf-8") as file:
    file.write(picture(conversation()))
