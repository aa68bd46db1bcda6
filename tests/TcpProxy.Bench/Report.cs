using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Text.Json;

namespace TcpProxy.Bench;

/// <summary>What a measurement can say, how it is called, and which of it is shown for which case.</summary>
internal sealed record Figure(string Key, string Title, bool MoreIsBetter = false, bool HasRatio = true)
{
    internal const string Rate = "rate";
    internal const string Cpu = "cpu";
    internal const string Busy = "busy";
    internal const string Foreign = "foreign";
    internal const string Peak = "peak_kb";
    internal const string P50 = "p50_us";
    internal const string P99 = "p99_us";
    internal const string PerConnection = "kb_connection";
    internal const string IdleCpu = "idle_cpu_ms_s";
    internal const string Pss = "pss_kb";
    internal const string Processes = "processes";
    internal const string Kept = "kept";
    internal const string Start = "start_ms";
    internal const string Binary = "binary_kb";
    internal const string WithLibraries = "binary_libraries_kb";

    internal static Figure[] Of(Case work) => work.Kind switch
    {
        Kind.BulkUp or Kind.BulkDown => [new(Cpu, "CPU s/GB"), new(Rate, "MB/s", MoreIsBetter: true)],
        Kind.PingPong =>
        [
            new(Cpu, "CPU µs/request"), new(Rate, "requests/s", MoreIsBetter: true),
            new(P50, "p50 µs"), new(P99, "p99 µs"),
        ],
        Kind.ConnectRate =>
        [
            new(Cpu, "CPU µs/connection"), new(Rate, "connections/s", MoreIsBetter: true),
            new(P50, "p50 µs"), new(P99, "p99 µs"),
        ],
        Kind.Mixed => [new(Rate, "MB/s of the fast", MoreIsBetter: true), new(Kept, "of their rate alone", HasRatio: false)],
        Kind.Idle =>
            [new(PerConnection, "PSS kB/connection"), new(IdleCpu, "CPU ms/s while idle", HasRatio: false)],
        Kind.Startup => [new(Start, "ms to the first byte"), new(Pss, "PSS kB then")],
        _ => [new(Binary, "kB, program"), new(WithLibraries, "kB, with libraries beyond libc")],
    };

    internal static string Brief(Case work, Sample sample) => string.Join(
        "  ",
        Of(work).Where(figure => sample.Figures.ContainsKey(figure.Key))
            .Select(figure => $"{Number(sample.Figures[figure.Key])} {figure.Title}"))
        + (sample.Disturbed ? "  (disturbed)" : "");

    internal static string Times(double ratio) =>
        ratio.ToString(ratio < 0.1 ? "0.000" : ratio < 10 ? "0.00" : "0", CultureInfo.InvariantCulture);

    /// <summary>Three figures that count, and no more.</summary>
    internal static string Number(double value)
    {
        double size = Math.Abs(value);
        string format = size >= 100 ? "N0" : size >= 10 ? "0.0" : size >= 1 ? "0.00" : "0.000";
        return value.ToString(format, CultureInfo.InvariantCulture);
    }
}

/// <summary>Medians over the rounds, ratios within a round, as markdown, JSON and a chart.</summary>
internal sealed class Report
{
    private const double FullyUsed = 0.8;

    private readonly Setting _setting;
    private readonly List<Case> _plan;
    private readonly List<Peer> _peers;
    private readonly List<Sample> _samples;
    private readonly Peer _reference;

    internal Report(Setting setting, List<Case> plan, List<Peer> peers, List<Sample> samples)
    {
        (_setting, _plan, _peers, _samples) = (setting, plan, peers, samples);
        _reference = peers.FirstOrDefault(peer => peer.Name == "haproxy")
            ?? peers.FirstOrDefault(peer => !peer.Ours)
            ?? peers[0];
    }

    internal static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        int middle = sorted.Length / 2;
        return sorted.Length == 0 ? double.NaN
            : sorted.Length % 2 == 1 ? sorted[middle]
            : (sorted[middle - 1] + sorted[middle]) / 2;
    }

    private double Value(Case work, Peer peer, string key) =>
        Median(Good(work, peer).Where(s => s.Figures.ContainsKey(key)).Select(s => s.Figures[key]));

    /// <summary>The median of the ratios that were taken within one round.</summary>
    private double Ratio(Case work, Peer peer, string key) => Median(
        from mine in Good(work, peer)
        from other in Good(work, _reference)
        where mine.Round == other.Round
            && mine.Figures.ContainsKey(key) && other.Figures.ContainsKey(key) && other.Figures[key] > 0
        select mine.Figures[key] / other.Figures[key]);

    private IEnumerable<Sample> Good(Case work, Peer peer) =>
        _samples.Where(s => s.Case == work.Name && s.Peer == peer.Name && s.Error is null);

    // -- markdown ----------------------------------------------------------------------------------------

    internal string Markdown()
    {
        StringBuilder text = new();
        Add(text, $"# tcpproxy beside its peers, {_setting.Date:yyyy-MM-dd HH:mm} UTC\n\n");
        Add(text, $"    {_setting.Command}\n\n");
        foreach (string line in _setting.Lines)
        {
            Add(text, $"- {line}\n");
        }
        Add(text, $"\n");
        AppendTable(text);
        AppendNotes(text);
        return text.ToString();
    }

    private void AppendTable(StringBuilder text)
    {
        List<string[]> rows = [["work", "figure", .. _peers.Select(peer => peer.Name)]];
        foreach (Case work in _plan)
        {
            string title = work.Title;
            foreach (Figure figure in Figure.Of(work))
            {
                string arrow = figure.MoreIsBetter ? " ↑" : "";
                rows.Add([title, figure.Title + arrow, .. _peers.Select(peer => Cell(work, peer, figure))]);
                title = "";
            }
        }
        int[] widths = [.. rows[0].Select((_, column) => rows.Max(row => row[column].Length))];
        rows.Insert(1, [.. widths.Select((width, i) => new string('-', width - 1) + (i < 2 ? "-" : ":"))]);
        foreach (string[] row in rows)
        {
            IEnumerable<string> cells =
                row.Select((cell, i) => i < 2 ? cell.PadRight(widths[i]) : cell.PadLeft(widths[i]));
            Add(text, $"| {string.Join(" | ", cells)} |\n");
        }
    }

    private string Cell(Case work, Peer peer, Figure figure)
    {
        double value = Value(work, peer, figure.Key);
        if (double.IsNaN(value))
        {
            return _samples.Any(s => s.Case == work.Name && s.Peer == peer.Name) ? "failed" : "-";
        }
        double ratio = figure.HasRatio && peer != _reference ? Ratio(work, peer, figure.Key) : double.NaN;
        string mark = figure.Key == Figure.Rate && Value(work, peer, Figure.Busy) < FullyUsed ? "*" : "";
        return Figure.Number(value) + mark + (double.IsNaN(ratio) ? "" : $" ({Figure.Times(ratio)}x)");
    }

    private void AppendNotes(StringBuilder text)
    {
        Add(text, $"""

            In brackets: the ratio to {_reference.Name}, taken within a round, median of {Rounds()} round(s).
            Less is better, except where ↑ stands. CPU is that of the proxy's whole process tree.

            """);
        if (_plan.Any(work => _peers.Any(peer => Value(work, peer, Figure.Busy) < FullyUsed)))
        {
            Add(text, $"""

                `*` The proxy used less than 80 % of its CPU: the load generator, waiting for each other, or
                another program was the limit. It could have done more: compare the CPU, not the throughput.

                """);
        }
        int disturbed = _samples.Count(s => s.Disturbed);
        if (disturbed > 0)
        {
            Add(text, $"""

                During {disturbed} of {_samples.Count} measurements others took over a quarter of a CPU:
                run it again on a quiet machine before quoting it.

                """);
        }
        foreach (Sample failed in _samples.Where(s => s.Error is not null))
        {
            Add(text, $"\nFailed: {failed.Peer}, {failed.Case}: {failed.Error}.\n");
        }
    }

    private static void Add(StringBuilder text, FormattableString what) =>
        _ = text.Append(what.ToString(CultureInfo.InvariantCulture));

    private int Rounds() => _samples.Count == 0 ? 0 : _samples.Max(s => s.Round);

    // -- files -------------------------------------------------------------------------------------------

    internal string[] Save(string folder)
    {
        _ = Directory.CreateDirectory(folder);
        string name = Path.Combine(
            folder, _setting.Date.ToString("yyyy-MM-dd-HHmmss", CultureInfo.InvariantCulture));
        File.WriteAllText(name + ".md", Markdown());
        File.WriteAllBytes(name + ".json", Json());
        File.WriteAllText(name + ".svg", new Chart(this).Draw());
        return [name + ".md", name + ".json", name + ".svg"];
    }

    private byte[] Json()
    {
        using MemoryStream stream = new();
        using (Utf8JsonWriter json = new(stream, new JsonWriterOptions { Indented = true }))
        {
            json.WriteStartObject();
            json.WriteString("date", _setting.Date);
            json.WriteString("command", _setting.Command);
            json.WriteString("reference", _reference.Name);
            json.WriteStartArray("setting");
            Array.ForEach(_setting.Lines, json.WriteStringValue);
            json.WriteEndArray();
            json.WriteStartArray("medians");
            foreach (Case work in _plan)
            {
                _peers.ForEach(peer => WriteMedians(json, work, peer));
            }
            json.WriteEndArray();
            json.WriteStartArray("samples");
            _samples.ForEach(sample => WriteSample(json, sample));
            json.WriteEndArray();
            json.WriteEndObject();
        }
        return stream.ToArray();
    }

    private void WriteMedians(Utf8JsonWriter json, Case work, Peer peer)
    {
        string[] keys = [.. Good(work, peer).SelectMany(s => s.Figures.Keys).Distinct()];
        if (keys.Length == 0)
        {
            return;
        }
        json.WriteStartObject();
        json.WriteString("case", work.Name);
        json.WriteString("peer", peer.Name);
        foreach (string key in keys)
        {
            double ratio = Ratio(work, peer, key);
            json.WriteNumber(key, Math.Round(Value(work, peer, key), 4));
            if (!double.IsNaN(ratio) && Figure.Of(work).Any(figure => figure.Key == key && figure.HasRatio))
            {
                json.WriteNumber(key + "_ratio", Math.Round(ratio, 4));
            }
        }
        json.WriteEndObject();
    }

    private static void WriteSample(Utf8JsonWriter json, Sample sample)
    {
        json.WriteStartObject();
        json.WriteNumber("round", sample.Round);
        json.WriteString("case", sample.Case);
        json.WriteString("peer", sample.Peer);
        if (sample.Error is not null)
        {
            json.WriteString("error", sample.Error);
        }
        if (sample.Disturbed)
        {
            json.WriteBoolean("disturbed", true);
        }
        foreach ((string key, double value) in sample.Figures)
        {
            json.WriteNumber(key, Math.Round(value, 4));
        }
        json.WriteEndObject();
    }

    // -- chart -------------------------------------------------------------------------------------------

    /// <summary>Bars beside the reference's, which is 1, in colours for a light and a dark page.</summary>
    private sealed class Chart(Report report)
    {
        private const int Width = 820;
        private const int Left = 220;
        private const int BarStep = 13;
        private const int Right = 175; // the column of the figures
        private const double Longest = 2; // a bar beyond twice the reference is cut, and says so

        // The cases that stand for their kind; a chart of all of them is one that nobody reads.
        private static readonly string[] Shown =
        [
            "bulk/up/1", "bulk/up/16", "bulk/down/16", "pingpong/64/1", "pingpong/64/64",
            "pingpong/64/512", "pingpong/4096/64", "pingpong/16384/64", "connrate/32",
            "idle/1000", "idle/9000", "startup", "size",
        ];

        private const string Style = """
            <style>
              text { fill: #424a53; }
              .head { font-size: 15px; } .small { font-size: 10.5px; } .head, .own { font-weight: 600; }
              .end { text-anchor: end; }
              .axis { stroke: #8c959f; stroke-dasharray: 3 3; }
              .c0 { fill: #0969da; } .c1 { fill: #54aeff; }
              .p0 { fill: #8c959f; } .p1 { fill: #c2884a; } .p2 { fill: #6f9c76; } .p3 { fill: #a58bb5; }
              @media (prefers-color-scheme: dark) { text { fill: #c4ccd4; } .c0 { fill: #4493f8; } }
            </style>
            """;

        private readonly StringBuilder _text = new();

        internal string Draw()
        {
            Case[] shown = [.. report._plan.Where(work => Shown.Contains(work.Name))];
            if (shown.Length == 0)
            {
                shown = [.. report._plan];
            }
            int y = 78;
            foreach (Case work in shown)
            {
                y = Group(work, y);
            }
            double one = X(1);
            string title = $"Cost of the same work, {report._reference.Name} = 1, less is better";
            string body = _text.ToString();
            _ = _text.Clear();
            Add($"""
                <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {Width} {y + 4}" width="{Width}"
                  font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="12" role="img">
                <title>tcpproxy beside its peers: {title}</title>
                {Style}
                <text x="10" y="22" class="head">{title}</text>
                """);
            Legend();
            Add($"""<line x1="{one:0.#}" x2="{one:0.#}" y1="64" y2="{y - 8}" class="axis"/>""");
            return _text.Append(body).Append("</svg>\n").ToString();
        }

        private static double X(double ratio) =>
            Left + (Math.Min(ratio, Longest) / Longest * (Width - Left - Right));

        private void Legend()
        {
            double x = 10;
            foreach (Peer peer in report._peers)
            {
                Add($"""<rect x="{x:0}" y="38" width="11" height="11" rx="2" class="{Colour(peer)}"/>""");
                Add($"""<text x="{x + 16:0}" y="48">{peer.Name}</text>""");
                x += 36 + (peer.Name.Length * 7.2);
            }
            Add($"""<text x="{X(1):0.#}" y="60" class="small end">1</text>""");
        }

        private int Group(Case work, int y)
        {
            Figure figure = Figure.Of(work)[0];
            var bars = report._peers
                .Select(peer => (
                    peer,
                    value: report.Value(work, peer, figure.Key),
                    ratio: peer == report._reference ? 1 : report.Ratio(work, peer, figure.Key)))
                .Where(bar => !double.IsNaN(bar.value) && !double.IsNaN(bar.ratio))
                .ToList();
            if (bars.Count == 0)
            {
                return y;
            }
            Add($"""<text x="10" y="{y + 4}">{work.Title}</text>""");
            Add($"""<text x="10" y="{y + 18}" class="small">{figure.Title}</text>""");
            int top = y - 8;
            foreach ((Peer peer, double value, double ratio) in bars)
            {
                double width = Math.Max(1, X(ratio) - Left);
                double line = top + 9.5;
                string own = peer.Ours ? " own" : "";
                string bar = Colour(peer);
                Add($"""
                    <rect x="{Left}" y="{top}" width="{width:0.#}" height="{BarStep - 2}" class="{bar}"/>
                    <text x="{Width - Right + 8}" y="{line}" class="small{own}">{peer.Name}</text>
                    <text x="{Width - 58}" y="{line}" class="small{own} end">{Figure.Number(value)}</text>
                    <text x="{Width - 8}" y="{line}" class="small{own} end">{Figure.Times(ratio)}</text>
                    """);
                if (ratio > Longest)
                {
                    Add($"""<text x="{Width - Right - 4}" y="{line}" class="small end">→</text>""");
                }
                top += BarStep;
            }
            return Math.Max(top, y + 20) + 18;
        }

        private string Colour(Peer peer)
        {
            int index = report._peers.Where(other => other.Ours == peer.Ours).ToList().IndexOf(peer);
            return peer.Ours ? (index == 0 ? "c0" : "c1") : $"p{index % 4}";
        }

        private void Add(FormattableString text) =>
            _ = _text.Append(text.ToString(CultureInfo.InvariantCulture)).Append('\n');
    }
}
