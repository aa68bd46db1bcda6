using System;
using System.Diagnostics;
using System.Globalization;
using System.Linq;
using System.Net;
using System.Net.Http;
using System.Net.Sockets;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>The same toxic in the real toxiproxy, side by side. Debian has no package of it: whoever has built it (go build
/// ./cmd/server in a checkout of Shopify/toxiproxy) puts toxiproxy-server into the path.</summary>
[Collection("heavy")]
public sealed class ToxiproxyTests : EndToEndTest
{
    private static readonly HttpClient Http = new();

    [Fact(Timeout = Quick)]
    public async Task Latency_is_within_five_milliseconds()
    {
        (Line ours, Line theirs) = await Both("latency", ("latency", 100));
        (double our, double their) = (await Best(ours), await Best(theirs));
        Assert.InRange(our - their, -5, 5);

        static async Task<double> Best(Line line)
        {
            double best = double.MaxValue;
            for (int i = 0; i < 20; i++)
            {
                long start = Stopwatch.GetTimestamp();
                await line.Server.Send("x");
                await line.Client.ReceiveText("x");
                best = Math.Min(best, Stopwatch.GetElapsedTime(start).TotalMilliseconds);
            }

            return best;
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData(200)]
    [InlineData(2000)]
    public async Task Bandwidth_is_within_three_percent(int rate)
    {
        (Line ours, Line theirs) = await Both("bandwidth", ("rate", rate));
        double[] rates = await Task.WhenAll(Wait.Apart(() => Rate(ours)), Wait.Apart(() => Rate(theirs)));
        Assert.InRange(rates[0] / rates[1], 0.97, 1.03);

        static async Task<double> Rate(Line line)
        {
            _ = Endless(line.Server);
            byte[] buffer = new byte[1 << 20];
            long total = await line.Client.ReceiveSome(buffer);
            Stopwatch clock = Stopwatch.StartNew();
            for (total = 0; clock.ElapsedMilliseconds < 4_000;)
            {
                total += await line.Client.ReceiveSome(buffer);
            }

            return total / clock.Elapsed.TotalSeconds;
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData("slow_close", "delay")]
    [InlineData("timeout", "timeout")]
    [InlineData("reset_peer", "timeout")]
    public async Task An_end_comes_at_the_same_time_and_in_the_same_way(string toxic, string key)
    {
        (Line ours, Line theirs) = await Both(toxic, (key, 700));
        (double Time, int Bytes, SocketError Error)[] ends = await Task.WhenAll(End(ours), End(theirs));
        Assert.InRange(ends[0].Time - ends[1].Time, -100, 100);
        Assert.Equal((ends[1].Bytes, ends[1].Error), (ends[0].Bytes, ends[0].Error));

        async Task<(double, int, SocketError)> End(Line line)
        {
            long start = Stopwatch.GetTimestamp();
            await line.Server.Send("hello");
            if (toxic == "slow_close")
            {
                line.Server.Finish();
            }

            (byte[] bytes, SocketError error) = await line.Client.Drain();
            return (Stopwatch.GetElapsedTime(start).TotalMilliseconds, bytes.Length, error);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Slices_take_no_longer_but_the_lateness_of_timers_is_made_up_for()
    {
        (Line ours, Line theirs) = await Both("slicer", ("average_size", 100), ("delay", 10_000));
        double[] times = await Task.WhenAll(Wait.Apart(() => Time(ours)), Wait.Apart(() => Time(theirs)));
        Assert.InRange(times[0], 126 * 10, times[1] * 1.05);

        static async Task<double> Time(Line line)
        {
            long start = Stopwatch.GetTimestamp();
            await line.Server.Send(new byte[10_240]);
            Assert.Equal(10_240, (await line.Client.Receive(10_240)).Length);
            return Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        }
    }

    [Theory(Timeout = Quick)]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(100_000)]
    public async Task Limit_data_lets_the_same_bytes_pass(int limit)
    {
        (Line ours, Line theirs) = await Both("limit_data", ("bytes", limit));
        foreach (Line line in (Line[])[ours, theirs])
        {
            await line.Server.Send(new byte[limit + 10]);
            (byte[] bytes, SocketError error) = await line.Client.Drain();
            Assert.Equal((limit, SocketError.Success), (bytes.Length, error));
        }
    }

    private sealed record Line(Peer Client, Peer Server);

    /// <summary>A connection through us, and one through toxiproxy, with that toxic downstream.</summary>
    private async Task<(Line Ours, Line Theirs)> Both(string toxic, params (string Key, int Value)[] attributes)
    {
        string server = Tool.Need("toxiproxy-server", "golang, and go build -o toxiproxy-server ./cmd/server in a checkout of Shopify/toxiproxy");
        int port = Given.FreePorts(2);
        Tool.Background(Given, server, "-host", "127.0.0.1", "-port", port.ToString(CultureInfo.InvariantCulture));
        IPEndPoint at = new(IPAddress.Loopback, port + 1);
        Upstream upstream = Given.Server();
        await Wait.Until(() => Answers(port), "toxiproxy's answer");
        await Post($"http://127.0.0.1:{port}/proxies",
            $$"""{"name":"p","listen":"{{at}}","upstream":"{{upstream.Address}}","enabled":true}""");
        string values = string.Join(',', attributes.Select(one => $"\"{one.Key}\":{one.Value}"));
        await Post($"http://127.0.0.1:{port}/proxies/p/toxics",
            $$"""{"type":"{{toxic}}","stream":"downstream","attributes":{ {{values}} } }""");

        string words = string.Concat(attributes.Select(one => $" {one.Key}={one.Value}"));
        ProxyProcess proxy = await Given.Proxy("127.0.0.1:0", upstream.Address, "--toxic", toxic + words);
        return (await Connect(proxy.Endpoint()), await Connect(at));

        async Task<Line> Connect(EndPoint to) => new(await Given.Client(to), await upstream.Accept());

        static bool Answers(int port)
        {
            using Socket socket = new(SocketType.Stream, ProtocolType.Tcp);
            try
            {
                socket.Connect(IPAddress.Loopback, port);
                return true;
            }
            catch (SocketException)
            {
                return false;
            }
        }

        static async Task Post(string url, string json)
        {
            using StringContent content = new(json, Encoding.UTF8, "application/json");
            using HttpResponseMessage answer = await Http.PostAsync(new Uri(url), content, TestContext.Current.CancellationToken);
            Assert.True(answer.IsSuccessStatusCode, await answer.Content.ReadAsStringAsync(TestContext.Current.CancellationToken));
        }
    }

    private static async Task Endless(Peer peer)
    {
        byte[] block = new byte[64 << 10];
        try
        {
            while (true)
            {
                await peer.SendSome(block).ConfigureAwait(false);
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // the end of the test
        }
    }
}
