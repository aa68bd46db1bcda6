using System;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using System.Text.Json;
using Xunit;

namespace TcpProxy.Tests;

public sealed class ObserveTests
{
    private static readonly string[] DesignKeys =
    [
        "time", "level", "event", "route", "client", "upstream", "server", "connect_ms", "duration_ms", "bytes_up",
        "bytes_down", "end", "reason",
    ];

    [Fact]
    public void A_connection_has_the_keys_of_the_design_in_their_order_in_both_formats()
    {
        using JsonDocument json = JsonDocument.Parse(Format(Line(), LogFormat.Json));
        Assert.Equal(DesignKeys, json.RootElement.EnumerateObject().Select(p => p.Name));
        Assert.Equal(JsonValueKind.Number, json.RootElement.GetProperty("bytes_up").ValueKind);
        Assert.Equal("he said \"x\u001b[1m\"", json.RootElement.GetProperty("reason").GetString());

        string text = Format(Line(), LogFormat.Text);
        Assert.EndsWith("bytes_up=12 bytes_down=34 end=SC reason=\"he said \\\"x\\u001b[1m\\\"\"\n", text, StringComparison.Ordinal);
        Assert.Contains(" route=\"my route\" client=127.0.0.1:80 upstream=db:1 server=- connect_ms=-1 ", text, StringComparison.Ordinal);
    }

    [Fact]
    public void Every_line_of_a_thousand_is_written_before_the_log_stops()
    {
        string file = Path.GetTempFileName();
        try
        {
            using (Log log = new(new LogSettings { File = file }))
            {
                log.Start();
                for (int i = 0; i < 1000; i++)
                {
                    log.Event(LogLevel.Info, "test", $"{i}");
                }

                log.Stop(10_000);
            }

            string[] lines = File.ReadAllLines(file);
            Assert.Equal(1000, lines.Length);
            Assert.All(lines.Index(), line =>
                Assert.EndsWith($" event=test message={line.Index}", line.Item, StringComparison.Ordinal));
        }
        finally
        {
            File.Delete(file);
        }
    }

    private static ConnectionLine Line()
    {
        ConnectionLine line = new(new RouteStats("my route"))
        {
            Client = new IPEndPoint(IPAddress.Parse("::ffff:127.0.0.1"), 80),
            Target = "db:1",
            BytesUp = 12,
            BytesDown = 34,
        };
        line.Ended(new CloseReason("SC", "he said \"x\u001b[1m\""));
        line.Stamp();
        return line;
    }

    private static string Format(ConnectionLine line, LogFormat format)
    {
        LogText text = new(format);
        line.Format(text);
        return Encoding.UTF8.GetString(text.Bytes);
    }
}
