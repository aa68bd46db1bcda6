using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text.Json;

namespace TcpProxy.Tests;

/// <summary>One line of the proxy's log, logfmt or JSON, taken apart strictly.</summary>
internal sealed class LogLine
{
    private readonly Dictionary<string, string> _values = [];

    private LogLine(string raw) => Raw = raw;

    public string Raw { get; }

    public List<string> Keys { get; } = [];

    public string Event => this["event"];

    public string Level => this["level"];

    public string End => this["end"];

    public string Reason => this["reason"];

    public long BytesUp => Number("bytes_up");

    public long BytesDown => Number("bytes_down");

    public string this[string key] => _values.TryGetValue(key, out string? value)
        ? value
        : throw new KeyNotFoundException($"no '{key}' in: {Raw}");

    public bool Has(string key) => _values.ContainsKey(key);

    public long Number(string key) =>
        long.Parse(this[key], NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture);

    public static LogLine Parse(string raw)
    {
        LogLine line = new(raw);
        if (raw.StartsWith('{'))
        {
            line.ReadJson();
        }
        else
        {
            line.ReadLogfmt();
        }

        return line;
    }

    public override string ToString() => Raw;

    private void Add(string key, string value)
    {
        if (!_values.TryAdd(key, value))
        {
            throw new FormatException($"'{key}' stands twice in: {Raw}");
        }

        Keys.Add(key);
    }

    private void ReadJson()
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(Raw);
            foreach (JsonProperty property in document.RootElement.EnumerateObject())
            {
                Add(property.Name, property.Value.ToString());
            }
        }
        catch (JsonException e)
        {
            throw new FormatException($"not JSON ({e.Message}): {Raw}", e);
        }
    }

    private void ReadLogfmt()
    {
        for (int at = 0; at < Raw.Length; at++)
        {
            int equals = Raw.IndexOf('=', at);
            if (equals <= at || !Raw[at..equals].All(c => char.IsAsciiLetterLower(c) || c == '_'))
            {
                throw new FormatException($"no key at {at}: {Raw}");
            }

            string key = Raw[at..equals];
            at = equals + 1;
            int end = at;
            if (at < Raw.Length && Raw[at] == '"')
            {
                for (end++; end < Raw.Length && Raw[end] != '"'; end++)
                {
                    end += Raw[end] == '\\' ? 1 : 0;
                }

                end++;
                Add(key, JsonSerializer.Deserialize<string>(Raw[at..Math.Min(end, Raw.Length)])!);
            }
            else
            {
                while (end < Raw.Length && Raw[end] != ' ')
                {
                    end++;
                }

                string value = Raw[at..end];
                if (value.Length == 0 || value.Any(c => c is '"' or '=' or '\\' || char.IsControl(c)))
                {
                    throw new FormatException($"the value of '{key}' wants quotes: {Raw}");
                }

                Add(key, value);
            }

            if (end < Raw.Length && Raw[end] != ' ')
            {
                throw new FormatException($"no blank after the value of '{key}': {Raw}");
            }

            at = end;
        }

        if (Keys.Count == 0)
        {
            throw new FormatException("an empty line");
        }
    }
}
