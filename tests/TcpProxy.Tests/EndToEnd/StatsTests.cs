using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Text.Json;
using System.Text.RegularExpressions;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>--stats: what it counts, how it says it, and whom it serves.</summary>
public sealed class StatsTests : EndToEndTest
{
    private const string Odd = "a \"b\" \\ <img src=x onerror=alert(1)> \n\u001b[31m \u00e9\u2028\ud83d\ude80 </script>";

    // ---- counters

    [Fact(Timeout = Quick)]
    public async Task The_counters_are_what_clients_counted_and_the_sum_of_the_log()
    {
        Upstream upstream = Given.Server(async peer =>
        {
            byte[] asked = await peer.Receive(1);
            await peer.Send(new byte[1000 * asked[0]]);
            await peer.ReceiveToEnd();
            peer.Finish();
        });
        int refusing = Given.RefusingPort();
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", $"127.0.0.1:{refusing}", upstream.Address,
            "--name", "r", "--balance", "first", "--max-fails", "0", "--deny", "127.0.0.2");
        EndPoint stats = await Stats(proxy);
        long up = 0;
        long down = 0;
        await Wait.Many(40, 8, async i =>
        {
            using Peer client = await Peer.Connect(proxy.Endpoint());
            byte[] question = new byte[1 + (i * 100)];
            question[0] = (byte)i;
            await client.Send(question);
            client.Finish();
            Interlocked.Add(ref down, (await client.ReceiveToEnd()).Length);
            Interlocked.Add(ref up, question.Length);
        });
        for (int i = 0; i < 7; i++)
        {
            using Peer refused = await Peer.Connect(proxy.Endpoint(), new IPEndPoint(IPAddress.Parse("127.0.0.2"), 0));
            await refused.ExpectEnd();
        }

        List<LogLine> lines = await proxy.LinesOf("connection", 47);
        JsonElement route = await Settled(stats, json => json.GetProperty("routes")[0], r => Number(r, "connections") == 47 && Number(r, "current") == 0);
        Assert.Equal((up, down), (Number(route, "bytes_up"), Number(route, "bytes_down")));
        Assert.Equal((up, down), (lines.Sum(l => l.BytesUp), lines.Sum(l => l.BytesDown)));
        Assert.Equal(7, Number(route, "refused"));
        Assert.Equal(40, Number(route, "connect_failures"));
        Assert.Equal(40, Number(route, "retries"));
        Assert.InRange(Number(route, "max_current"), 1, 9);
        Assert.Equal(
            ["--:done:40", "PR:access rule:7"],
            route.GetProperty("ends").EnumerateArray().Where(e => Number(e, "count") > 0)
                .Select(e => $"{e.GetProperty("end")}:{e.GetProperty("reason")}:{e.GetProperty("count")}").Order());
        JsonElement bad = route.GetProperty("servers")[0];
        JsonElement good = route.GetProperty("servers")[1];
        Assert.Equal((0, 40, "connection refused"),
            (Number(bad, "connections"), Number(bad, "connect_failures"), bad.GetProperty("last_failure").GetString()));
        Assert.Equal((40, 0, up, down), (Number(good, "connections"), Number(good, "current"), Number(good, "bytes_up"), Number(good, "bytes_down")));
        Assert.Equal(40, Buckets(route, "duration"));
        Assert.Equal(40, Buckets(route, "connect_time"));

        Dictionary<string, string> metrics = await Metrics(stats);
        Assert.Equal("47", metrics["tcpproxy_frontend_connections_total{route=\"r\"}"]);
        Assert.Equal($"{up}", metrics["tcpproxy_frontend_bytes_in_total{route=\"r\"}"]);
        Assert.Equal($"{down}", metrics[$"tcpproxy_server_bytes_out_total{{route=\"r\",server=\"{upstream.Address}\"}}"]);
        Assert.Equal("40", metrics["tcpproxy_frontend_session_duration_seconds_bucket{route=\"r\",le=\"+Inf\"}"]);
        Assert.Equal("40", metrics["tcpproxy_backend_connect_time_seconds_count{route=\"r\"}"]);
        Assert.Equal("7", metrics["tcpproxy_frontend_ends_total{route=\"r\",end=\"PR\",reason=\"access rule\"}"]);
        Assert.Equal("1", metrics[$"tcpproxy_server_status{{route=\"r\",server=\"{upstream.Address}\",state=\"up\"}}"]);
    }

    [Fact(Timeout = Quick)]
    public async Task Running_connections_count_with_what_they_have_moved_so_far_and_sums_never_fall()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", Given.Echo().Address, "--log-level", "info");
        EndPoint stats = await Stats(proxy);
        Peer client = await Given.Client(proxy);
        await client.Ask(new string('x', 50_000));
        JsonElement json = await Settled(
            stats, s => s, s => Number(s.GetProperty("sessions")[0], "bytes_down") == 50_000); // they are counted when they are sent
        JsonElement session = json.GetProperty("sessions")[0];
        Assert.Equal((50_000, 1), (Number(session, "bytes_up"), Number(json, "current")));
        Assert.Equal(client.Local, session.GetProperty("client").GetString());
        Assert.Equal(50_000, Number(json.GetProperty("routes")[0], "bytes_up"));
        Assert.Equal(50_000, Number(json.GetProperty("routes")[0].GetProperty("servers")[0], "bytes_down"));

        long last = 0;
        bool isDone = false;
        Task clients = Wait.Many(300, 16, async _ =>
        {
            using Peer peer = await Peer.Connect(proxy.Endpoint());
            await peer.Ask(new string('y', 1000));
        });
        Task watching = Wait.Apart(async () =>
        {
            while (!Volatile.Read(ref isDone))
            {
                long now = Number((await Json(stats)).GetProperty("routes")[0], "bytes_up");
                Assert.True(now >= last, $"{now} after {last}");
                last = now;
            }
        });
        await clients;
        Volatile.Write(ref isDone, true);
        await watching;
        await Settled(stats, s => s.GetProperty("routes")[0], r => Number(r, "current") == 1 && Number(r, "bytes_up") == 350_000);
    }

    [Fact(Timeout = Quick)]
    public async Task The_history_shows_what_was_before_anybody_looked_and_goes_on_from_where_one_has_it()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        EndPoint stats = await Stats(proxy);
        using (Peer client = await Peer.Connect(proxy.Endpoint()))
        {
            await client.Ask("hello");
            await Settled(stats, s => s, s => Sum(s, "bytes_up") == 5 && Sum(s, "connections") == 1);
        }

        JsonElement json = await Json(stats);
        long samples = Number(json, "samples");
        Assert.Equal(samples, json.GetProperty("routes")[0].GetProperty("history").GetProperty("current").GetArrayLength());
        await Settled(stats, s => s, s => Number(s, "samples") > samples);
        json = await Json(stats, $"?since={samples}");
        Assert.Equal(Number(json, "samples") - samples, json.GetProperty("routes")[0].GetProperty("history").GetProperty("current").GetArrayLength());
        Assert.Equal(0, Sum(json, "bytes_up"));

        static long Sum(JsonElement json, string key) => json.GetProperty("routes")[0].GetProperty("history").GetProperty(key)
            .EnumerateArray().Sum(n => n.GetInt64());
    }

    [Fact(Timeout = Quick)]
    public async Task A_route_that_has_been_changed_and_then_removed_is_one()
    {
        const string Stays = "listen 127.0.0.1:0\nname stays\nupstream echo\n";
        const string Goes = $"{Stays}listen 127.0.0.1:0\nname goes\nupstream echo\n";
        string file = Given.Write("conf", Goes);
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "-c", file);
        EndPoint stats = await Stats(proxy);
        await (await Given.Client(proxy, 1)).Ask("before");
        await Reload($"{Goes}idle-timeout 1h\n", 1);
        await (await Given.Client(proxy, 1)).Ask("between");
        await Reload(Stays, 2);
        Dictionary<string, string> metrics = await Metrics(stats); // each of them once
        Assert.Equal("2", metrics["tcpproxy_frontend_connections_total{route=\"goes\"}"]);
        Assert.Equal("2", metrics["tcpproxy_frontend_current_sessions{route=\"goes\"}"]);

        async Task Reload(string text, int count)
        {
            Given.Write("conf", text);
            proxy.Signal(ProxyProcess.SigHup);
            await proxy.LinesOf("reload", count);
        }
    }

    [Fact(Timeout = Slow)]
    public async Task Time_in_which_the_process_stood_still_is_no_work_to_rest_from()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        EndPoint stats = await Stats(proxy);
        for (int i = 0; i < 10; i++)
        {
            bool isOver = false;
            double longest = 0;
            Task asking = Wait.Apart(async () =>
            {
                while (!Volatile.Read(ref isOver))
                {
                    Stopwatch clock = Stopwatch.StartNew();
                    await Ask(stats, "/");
                    longest = Math.Max(longest, clock.ElapsedMilliseconds);
                }
            });
            await Wait.Pause(50);
            proxy.Signal(ProxyProcess.SigStop);
            await Wait.Pause(1_200);
            proxy.Signal(ProxyProcess.SigCont);
            await Wait.Pause(20);
            Volatile.Write(ref isOver, true);
            await asking;
            Assert.InRange(longest, 1_100, 4_000);
        }
    }

    [Fact(Timeout = Quick)]
    public async Task Open_descriptors_are_counted_where_few_are_allowed()
    {
        Tool.NeedLibc("descriptors");
        ProxyProcess proxy = await Given.Proxy(Launch.WithDescriptors(200), "--stats", "0", "127.0.0.1:0", "echo");
        Dictionary<string, string> metrics = await Metrics(await Stats(proxy));
        Assert.InRange(int.Parse(metrics["tcpproxy_process_open_fds"], CultureInfo.InvariantCulture), 5, 60);
    }

    [Fact(Timeout = Quick)]
    public async Task A_route_that_a_reload_has_removed_counts_until_its_last_connection_has_ended()
    {
        string file = Given.Write("conf", "listen 127.0.0.1:0\nname stays\nupstream echo\nlisten 127.0.0.1:0\nname goes\nupstream echo\n");
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "-c", file);
        EndPoint stats = await Stats(proxy);
        Peer client = await Given.Client(proxy, 1);
        await client.Ask("before");
        Given.Write("conf", "listen 127.0.0.1:0\nname stays\nupstream echo\n");
        proxy.Signal(ProxyProcess.SigHup);
        JsonElement gone = await Settled(
            stats, s => s, s => s.GetProperty("routes").GetArrayLength() == 2 && !s.GetProperty("routes")[1].GetProperty("in_force").GetBoolean());
        Assert.Equal("goes", gone.GetProperty("routes")[1].GetProperty("name").GetString());
        await client.Ask("after");
        await Settled(stats, s => s.GetProperty("routes")[1], r => Number(r, "bytes_up") == 11);
        Assert.Equal("ok\n", (await Ask(stats, "/healthz")).Body);
        client.Dispose();
        await Settled(stats, s => s, s => s.GetProperty("routes").GetArrayLength() == 1);
    }

    [Fact(Timeout = Quick)]
    public async Task Names_that_clients_send_make_one_reason_not_one_each()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "-l", "127.0.0.1:0", "--sni", "a.example", "-u", "echo");
        EndPoint stats = await Stats(proxy);
        for (int i = 0; i < 5; i++)
        {
            Peer client = await Given.Client(proxy);
            await client.Send($"no hello {i}");
            await client.Drain();
        }

        JsonElement route = await Settled(stats, s => s.GetProperty("routes")[0], r => Number(r, "refused") == 5);
        JsonElement end = Assert.Single(route.GetProperty("ends").EnumerateArray(), e => Number(e, "count") > 0);
        Assert.Equal(5, Number(end, "count"));
    }

    // ---- health

    [Fact(Timeout = Quick)]
    public async Task Health_is_503_while_a_route_has_no_server_up_and_while_draining()
    {
        Upstream upstream = Given.Echo();
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "-l", "127.0.0.1:0", "-u", "echo", "-l", "127.0.0.1:0", "--name", "r\"x", "-u",
            upstream.Address, "--check", "100ms", "--check-fall", "1");
        proxy.Tolerate("server");
        EndPoint stats = await Stats(proxy);
        Assert.Equal("200 ok\n", await Get("/healthz"));
        upstream.Refuse();
        await proxy.Line("server", l => l["state"] == "down");
        Assert.Equal("503 route r\\\"x has no server up\n", await Get("/healthz"));

        Peer client = await Given.Client(proxy);
        await client.Ask("still there");
        proxy.Signal(ProxyProcess.SigTerm);
        await proxy.Line("draining");
        Assert.Equal("503 draining\n", await Get("/healthz"));
        Assert.True((await Json(stats)).GetProperty("draining").GetBoolean());
        client.Dispose();
        Assert.Equal(0, await proxy.Exit());

        async Task<string> Get(string path)
        {
            Answer answer = await Ask(stats, path);
            return $"{answer.Status} {answer.Body}";
        }
    }

    // ---- formats

    [Fact(Timeout = Quick)]
    public async Task Promtool_finds_nothing_to_say_whatever_the_names_are()
    {
        string promtool = Tool.Need("promtool", "prometheus");
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "-l", "127.0.0.1:0", "--name", Odd, "-u", "echo", "-u", "discard",
            "-l", "127.0.0.1:0", "--name", "twice", "-u", "127.0.0.1:1", "-u", "127.0.0.1:1",
            "-l", "127.0.0.1:0", "--name", "twice", "-u", "no.such.host.invalid:1");
        EndPoint stats = await Stats(proxy);
        using (Peer client = await Peer.Connect(proxy.Endpoint()))
        {
            await client.Ask("x");
        }

        await proxy.Connection();
        string metrics = (await Ask(stats, "/metrics")).Body;
        Outcome outcome = await Tool.Run(promtool, ["check", "metrics"], 30, input: metrics);
        Assert.Equal((0, "", ""), (outcome.Status, outcome.Out, outcome.Err));
        string[] series = [.. metrics.Split('\n').Where(l => l.Length > 0 && l[0] != '#').Select(l => l[..l.LastIndexOf(' ')])];
        Assert.Equal(series.Length, series.Distinct().Count());
        Assert.Contains("route=\"twice#2\"", metrics, StringComparison.Ordinal);
    }

    [Fact(Timeout = Quick)]
    public async Task The_document_is_JSON_whatever_the_names_are()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "--name", Odd, "127.0.0.1:0", "echo", "discard");
        JsonElement json = await Json(await Stats(proxy));
        Assert.Equal(Odd, json.GetProperty("routes")[0].GetProperty("name").GetString());
        Assert.Equal(["echo", "discard"], json.GetProperty("routes")[0].GetProperty("servers").EnumerateArray().Select(s => s.GetProperty("name").GetString()));
    }

    // ---- HTTP

    public static readonly TheoryData<string, int> Requests = new()
    {
        { "GET / HTTP/1.1\r\n\r\n", 200 },
        { "GET / HTTP/1.0\r\n\r\n", 200 },
        { "GET /?x=y HTTP/1.1\r\nHost: localhost:9000\r\nX: y\r\n\r\n", 200 },
        { "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200 },
        { "GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200 },
        { "GET / HTTP/1.1\r\nHost: mybox:80\r\n\r\n", 200 },
        { "GET / HTTP/1.1\r\nhost: evil.example:80\r\n\r\n", 421 },
        { "GET /stats.json?since=99999999999999999999&sessions=&=&& HTTP/1.1\r\n\r\n", 200 },
        { "GET /stats.json?since=-1 HTTP/1.1\r\n\r\n", 200 },
        { "GET /stats.json?since= HTTP/1.1\r\n\r\n", 200 },
        { "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 405 },
        { "OPTIONS * HTTP/1.1\r\n\r\n", 405 },
        { "get / HTTP/1.1\r\n\r\n", 405 },
        { "GET /x HTTP/1.1\r\n\r\n", 404 },
        { "GET /../etc/passwd HTTP/1.1\r\n\r\n", 404 },
        { "GET //metrics HTTP/1.1\r\n\r\n", 404 },
        { "GET /metrics/ HTTP/1.1\r\n\r\n", 404 },
        { "GET /%2e HTTP/1.1\r\n\r\n", 404 },
        { "GET /\r\n\r\n", 400 },
        { "GET / HTTP/2.0\r\n\r\n", 400 },
        { "GET  / HTTP/1.1\r\n\r\n", 400 },
        { "\r\n\r\n", 400 },
        { "\0\0\0\0\r\n\r\n", 400 },
        { "GET / HTTP/1.1\r\nX: ", 400 }, // and then FIN
        { "GET / HTTP/1.1\r\n" + "X: " + new string('x', 8200) + "\r\n\r\n", 431 },
    };

    [Theory(Timeout = Quick)]
    [MemberData(nameof(Requests))]
    public async Task A_request_gets_the_answer_that_it_deserves(string request, int status)
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        Answer answer = await Send(await Stats(proxy), request);
        Assert.Equal(status, answer.Status);
        Assert.Equal($"{Encoding.UTF8.GetByteCount(answer.Body)}", answer.Headers["content-length"]);
        Assert.Equal(("close", "no-store", "nosniff"),
            (answer.Headers["connection"], answer.Headers["cache-control"], answer.Headers["x-content-type-options"]));
        Assert.StartsWith("default-src 'none';", answer.Headers["content-security-policy"], StringComparison.Ordinal);
        Assert.DoesNotContain(answer.Headers.Keys, k => k.StartsWith("access-control-", StringComparison.Ordinal));
        Assert.Equal(status == 405, answer.Headers.ContainsKey("allow"));
    }

    [Fact(Timeout = Quick)]
    public async Task HEAD_is_GET_without_the_body()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        EndPoint stats = await Stats(proxy);
        Answer get = await Ask(stats, "/");
        Answer head = await Send(stats, "HEAD / HTTP/1.1\r\n\r\n");
        Assert.Equal((200, ""), (head.Status, head.Body));
        Assert.Equal(get.Headers, head.Headers);
    }

    [Fact(Timeout = Slow)]
    public async Task Random_requests_get_an_answer_or_an_end_and_change_nothing()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        EndPoint stats = await Stats(proxy);
        int seed = Random.Shared.Next();
        TestContext.Current.TestOutputHelper?.WriteLine($"seed {seed}");
        string[] pieces = ["GET", "HEAD", "PUT", " ", "  ", "/", "/stats.json", "/metrics", "?since=", "?", "&", "HTTP/1.1", "HTTP/9", "\r\n", "\n",
            "\r\n\r\n", "Host: ", "a.b", ":", "Content-Length: 99999999999", "\0", "\u00ff", "%00", "..", "[", "]", "9223372036854775808", "-1"];
        await Wait.Many(400, 8, async i =>
        {
            Random random = new(seed + i);
            StringBuilder text = new(random.Next(2) == 0 ? "GET /stats.json" : "");
            for (int n = random.Next(12); n > 0; n--)
            {
                text.Append(pieces[random.Next(pieces.Length)]);
            }

            text.Append(random.Next(3) == 0 ? new string('x', random.Next(20_000)) : "").Append(random.Next(3) > 0 ? "\r\n\r\n" : "");
            using Peer peer = await Peer.Connect(stats);
            try
            {
                await peer.Send(Encoding.Latin1.GetBytes(text.ToString()));
                peer.Finish();
            }
            catch (SocketException)
            {
                return; // answered before it had said all
            }

            (byte[] data, SocketError error) = await peer.Drain();
            Assert.True(error != SocketError.Success || text.Length == 0 || Encoding.UTF8.GetString(data).StartsWith("HTTP/1.1 ", StringComparison.Ordinal),
                $"seed {seed} + {i}: {error} {data.Length} bytes");
        });
        Assert.Equal("ok\n", (await Ask(stats, "/healthz")).Body);
        await (await Given.Client(proxy)).Ask("still there");
    }

    [Fact(Timeout = Quick)]
    public async Task Who_does_not_ask_or_read_is_cut_off_and_a_crowd_is_closed_at_once()
    {
        string[] many = [.. Enumerable.Range(1, 2000).SelectMany(i => new[] { "-u", $"127.0.0.1:{i}" })];
        ProxyProcess proxy = await Given.Proxy(["--stats", "0", "-l", "127.0.0.1:0", .. many, "-l", "127.0.0.1:0", "-u", "echo"]);
        EndPoint stats = await Stats(proxy);
        Peer relayed = await Given.Client(proxy, 1);
        Stopwatch watch = Stopwatch.StartNew();
        Peer[] silent = await Task.WhenAll(Enumerable.Range(0, 63).Select(_ => Given.Client(stats)));
        await silent[0].Send("GET / HTT");
        Socket lazy = new(AddressFamily.InterNetwork, SocketType.Stream, ProtocolType.Tcp) { ReceiveBufferSize = 4096 };
        Peer reader = Given.Client(new Peer(lazy));
        await lazy.ConnectAsync(stats, TestContext.Current.CancellationToken);
        await reader.Send("GET /metrics HTTP/1.1\r\n\r\n");
        Peer extra = await Given.Client(stats);
        Assert.Empty((await extra.Drain(2)).Data); // the 65th
        Assert.True(watch.Elapsed < TimeSpan.FromSeconds(4), $"{watch.Elapsed}");
        await relayed.Ask("not disturbed");

        (byte[] data, SocketError error) = await silent[0].Drain(8);
        Assert.Empty(data);
        Assert.InRange(watch.Elapsed.TotalSeconds, 4, 9);
        Assert.NotEqual(SocketError.Success, error);
        await Wait.Until(() => reader.Socket.Poll(0, SelectMode.SelectError) || IsReset(reader.Socket), "the end of the one who does not read", 15);
        Assert.Equal("ok\n", (await Ask(stats, "/healthz")).Body.Replace("route 127.0.0.1:0 has no server up", "ok", StringComparison.Ordinal));

        static bool IsReset(Socket socket) => (int)socket.GetSocketOption(SocketOptionLevel.Socket, SocketOptionName.Error)! != 0;
    }

    [Theory(Timeout = Quick)]
    [InlineData("0", "127.0.0.1")]
    [InlineData("0.0.0.0:0", "0.0.0.0")]
    [InlineData("127.0.0.3:0", "127.0.0.3")]
    [InlineData("unix:stats.sock", "unix:stats.sock")]
    public async Task It_listens_where_it_is_told_and_a_port_alone_is_loopback(string address, string bound)
    {
        ProxyProcess proxy = await Given.Proxy("--stats", address, "127.0.0.1:0", "echo");
        string said = (await proxy.Line("stats"))["message"];
        Assert.StartsWith(bound, said, StringComparison.Ordinal);
        EndPoint stats = said.StartsWith("unix:", StringComparison.Ordinal)
            ? new UnixDomainSocketEndPoint(Path.Combine(Path.GetDirectoryName(proxy.PortFilePath)!, "stats.sock"))
            : new IPEndPoint(IPAddress.Parse(bound == "0.0.0.0" ? "127.0.0.1" : bound), IPEndPoint.Parse(said).Port);
        Assert.Equal("ok\n", (await Ask(stats, "/healthz")).Body);
    }

    [Fact(Timeout = Quick)]
    public async Task An_address_that_is_taken_is_said_and_nothing_starts()
    {
        Upstream other = Given.Echo();
        Outcome outcome = await Tool.Proxy("--stats", other.Address, "127.0.0.1:0", "echo", "--log", "off");
        Assert.Equal((1, $"tcpproxy: error: --stats: cannot listen on {other.Address}: address already in use\n"), (outcome.Status, outcome.Err));
    }

    // ---- the page

    [Fact(Timeout = Slow)]
    public async Task The_page_draws_itself_in_a_browser_and_names_are_text()
    {
        string chromium = Tool.Need("chromium", "chromium");
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo", $"127.0.0.1:{Given.RefusingPort()}", "--name", Odd,
            "--balance", "first");
        EndPoint stats = await Stats(proxy);
        Peer client = await Given.Client(proxy);
        await client.Ask(new string('x', 12_345));
        string url = $"http://{stats}/";
        string[] browser = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000",
            $"--user-data-dir={Given.Path("browser")}"];
        string dom = (await Tool.Run(chromium, [.. browser, "--dump-dom", url], 90)).Good();
        Assert.Contains("&lt;img src=x onerror=alert(1)&gt;", dom, StringComparison.Ordinal);
        Assert.DoesNotContain("<img", dom, StringComparison.Ordinal);
        Assert.Contains(client.Local, dom, StringComparison.Ordinal);
        Assert.Contains("12.3 kB", dom, StringComparison.Ordinal);
        Assert.Contains(">healthy<", dom, StringComparison.Ordinal);
        Assert.Matches("<path d=\"M\\d+ ", dom);

        foreach (int width in new[] { 1280, 500 })
        {
            string picture = Given.Path($"{width}.png");
            (await Tool.Run(chromium, [.. browser, $"--window-size={width},900", $"--screenshot={picture}", url], 90)).Good();
            Assert.True(new FileInfo(picture).Length > 15_000, $"{width} wide: {new FileInfo(picture).Length} bytes");
        }
    }

    [Fact(Timeout = Quick)]
    public async Task The_page_asks_for_nothing_from_elsewhere()
    {
        ProxyProcess proxy = await Given.Proxy("--stats", "0", "127.0.0.1:0", "echo");
        string page = (await Ask(await Stats(proxy), "/")).Body;
        Assert.Equal(["http://www.w3.org/2000/svg"], Regex.Matches(page, "https?://[^'\"\\s)]+").Select(m => m.Value).Distinct());
        Assert.DoesNotContain("innerHTML", page, StringComparison.Ordinal);
        Assert.DoesNotMatch("src=|@import|url\\(", page);
    }

    // ---- helpers

    private sealed record Answer(int Status, Dictionary<string, string> Headers, string Body);

    private static async Task<EndPoint> Stats(ProxyProcess proxy) => IPEndPoint.Parse((await proxy.Line("stats"))["message"]);

    private static Task<Answer> Ask(EndPoint stats, string target) => Send(stats, $"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n");

    private static async Task<Answer> Send(EndPoint stats, string request)
    {
        using Peer peer = await Peer.Connect(stats);
        await peer.Send(Encoding.Latin1.GetBytes(request));
        peer.Finish();
        string text = Encoding.UTF8.GetString(await peer.ReceiveToEnd());
        int end = text.IndexOf("\r\n\r\n", StringComparison.Ordinal);
        string[] lines = text[..end].Split("\r\n");
        Assert.StartsWith("HTTP/1.1 ", lines[0], StringComparison.Ordinal);
        return new Answer(int.Parse(lines[0].Split(' ')[1], CultureInfo.InvariantCulture),
            lines[1..].ToDictionary(l => l.Split(": ")[0].ToLowerInvariant(), l => l.Split(": ", 2)[1]), text[(end + 4)..]);
    }

    private static async Task<JsonElement> Json(EndPoint stats, string query = "")
    {
        Answer answer = await Ask(stats, $"/stats.json{query}");
        Assert.Equal((200, "application/json; charset=utf-8"), (answer.Status, answer.Headers["content-type"]));
        using JsonDocument document = JsonDocument.Parse(answer.Body);
        return document.RootElement.Clone();
    }

    private static async Task<JsonElement> Settled(EndPoint stats, Func<JsonElement, JsonElement> of, Func<JsonElement, bool> isSo)
    {
        for (long start = Environment.TickCount64; ;)
        {
            JsonElement found = of(await Json(stats));
            if (isSo(found))
            {
                return found;
            }

            Assert.True(Environment.TickCount64 - start < 15_000, $"not within 15 s: {found}");
            await Wait.Pause(20);
        }
    }

    private static async Task<Dictionary<string, string>> Metrics(EndPoint stats)
    {
        Answer answer = await Ask(stats, "/metrics");
        Assert.Equal("text/plain; version=0.0.4; charset=utf-8", answer.Headers["content-type"]);
        return answer.Body.Split('\n').Where(l => l.Length > 0 && l[0] != '#').ToDictionary(l => l[..l.LastIndexOf(' ')], l => l[(l.LastIndexOf(' ') + 1)..]);
    }

    private static long Number(JsonElement of, string key) => of.GetProperty(key).GetInt64();

    private static long Buckets(JsonElement route, string histogram) => route.GetProperty(histogram).GetProperty("counts").EnumerateArray().Sum(n => n.GetInt64());
}
