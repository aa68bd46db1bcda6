using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>What nginx and HAProxy say to the same rules and addresses.</summary>
[Collection("heavy")]
public sealed class AccessOracleTests : EndToEndTest
{
    private const int Lists = 500;
    private const int Addresses = 200;

    private static readonly DateTime Noon = new(2026, 11, 23, 12, 0, 0, DateTimeKind.Utc);

    /// <summary>Each list is a listener of nginx on a unix socket, each address comes in a PROXY header.</summary>
    [Fact(Timeout = Slow)]
    public async Task Nginx_says_the_same()
    {
        string nginx = Tool.Need("nginx", "nginx");
        const string Module = "/usr/lib/nginx/modules/ngx_stream_module.so";
        Assert.SkipUnless(File.Exists(Module), "no stream module: apt-get install libnginx-mod-stream");
        List<List<(bool IsAllow, string Who)>> lists = RandomLists(1, isShort: true);
        StringBuilder servers = new();
        for (int i = 0; i < Lists; i++)
        {
            servers.Append($"server {{ listen unix:{Given.Path($"n{i}")} proxy_protocol; set_real_ip_from unix:; ");
            lists[i].ForEach(rule => servers.Append($"{(rule.IsAllow ? "allow" : "deny")} {rule.Who}; "));
            servers.Append("deny 192.0.2.1; return A; }\n"); // without any IPv4 rule it takes ::ffff:10.0.0.1 for IPv6
        }

        string configuration = Given.Write(
            "nginx.conf",
            $$"""
            load_module {{Module}};
            daemon off; pid {{Given.Path("nginx.pid")}}; error_log /dev/null crit; {{(Tool.IsRoot ? "user root;" : "")}}
            worker_processes 2;
            events { worker_connections 2048; }
            stream {
            {{servers}}
            }
            """);
        Tool.Background(Given, nginx, "-p", Given.Folder, "-c", configuration);
        await Wait.Until(() => File.Exists(Given.Path("nginx.pid")), "nginx");
        Compare(lists, i => new UnixDomainSocketEndPoint(Given.Path($"n{i}")), "", Addresses);
    }

    /// <summary>The same; HAProxy looks for IPv4 clients in ::/0 as well, so the lists have no network that wide.</summary>
    [Fact(Timeout = Slow)]
    public async Task Haproxy_says_the_same()
    {
        string haproxy = Tool.Need("haproxy", "haproxy");
        List<List<(bool IsAllow, string Who)>> lists = RandomLists(2, isShort: false);
        StringBuilder frontends = new();
        for (int i = 0; i < Lists; i++)
        {
            frontends.Append($"frontend f{i}\n  bind unix@{Given.Path($"h{i}")} accept-proxy\n");
            lists[i].ForEach(rule => frontends.Append(
                $"  tcp-request session {(rule.IsAllow ? "accept" : "reject")}{(rule.Who == "all" ? "" : $" if {{ src {rule.Who} }}")}\n"));
            frontends.Append("  http-request return status 200\n");
        }

        string configuration = Given.Write(
            "haproxy.cfg",
            $"""
            global
              maxconn 2048
            defaults
              mode http
              timeout client 10s
              timeout server 10s
              timeout connect 5s
            {frontends}

            """);
        Tool.Background(Given, haproxy, "-db", "-f", configuration);
        await Wait.Until(() => File.Exists(Given.Path($"h{Lists - 1}")), "haproxy");
        Compare(lists, i => new UnixDomainSocketEndPoint(Given.Path($"h{i}")), "GET / HTTP/1.0\r\n\r\n", Addresses);
    }

    /// <summary>The native binary says the same as the rules do in this process, of which the others have been asked.</summary>
    [Fact(Timeout = Slow)]
    public async Task The_binary_says_the_same()
    {
        List<List<(bool IsAllow, string Who)>> lists = RandomLists(3, isShort: true);
        StringBuilder routes = new("accept-proxy unix\n");
        for (int i = 0; i < Lists; i++)
        {
            routes.Append($"listen unix:{Given.Path($"t{i}")}\nupstream echo\n");
            for (int n = 0; n < lists[i].Count; n++)
            {
                (bool isAllow, string who) = lists[i][n];
                string list = n % 3 == 0 && who != "all" ? "@" + Given.Write($"l{i}-{n}", $"# {n}\n{who}\n") : who;
                routes.Append($"{(isAllow ? "allow" : "deny")} {list}\n");
            }
        }

        await Given.Proxy("-c", Given.Write("conf", routes.ToString()), "-q");
        Compare(lists, i => new UnixDomainSocketEndPoint(Given.Path($"t{i}")), "A", 20);
    }

    private static void Compare(
        List<List<(bool IsAllow, string Who)>> lists, Func<int, EndPoint> listener, string words, int addresses)
    {
        int denied = 0;
        List<string> differences = [];
        long start = Stopwatch.GetTimestamp();
        Parallel.For(0, Lists, new ParallelOptions { MaxDegreeOfParallelism = 8, CancellationToken = TestContext.Current.CancellationToken }, i =>
        {
            AccessRules rules = new();
            lists[i].ForEach(rule => rules.Add(new AccessRule(rule.IsAllow, rule.Who, "", new Settings().AccessFileOf)));
            Random random = new(i);
            EndPoint to = listener(i);
            for (int n = 0; n < addresses; n++)
            {
                IPAddress address = RandomAddress(random);
                bool isAllowed = rules.Judge(new IPEndPoint(address, 1), Noon).IsAllowed;
                if (Ask(to, address, words) != isAllowed)
                {
                    lock (differences)
                    {
                        differences.Add($"{address}: {(isAllowed ? "allowed" : "denied")} by us, list {i}: {string.Join("; ", lists[i])}");
                    }
                }

                Interlocked.Add(ref denied, isAllowed ? 0 : 1);
            }
        });
        TestContext.Current.TestOutputHelper?.WriteLine(
            $"{Lists * addresses} connections in {Stopwatch.GetElapsedTime(start).TotalSeconds:0.0} s, {denied} denied");
        Assert.True(differences.Count == 0, $"{differences.Count} differences\n{string.Join('\n', differences.Take(5))}");
        Assert.InRange(denied, Lists * addresses / 5, Lists * addresses * 4 / 5); // else the lists say little
    }

    /// <summary>Whether a client of that address gets an answer.</summary>
    private static bool Ask(EndPoint to, IPAddress address, string words)
    {
        string family = address.AddressFamily == AddressFamily.InterNetwork ? $"TCP4 {address} 192.0.2.1" : $"TCP6 {address} 2001:db8::1";
        using Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.ReceiveTimeout = 20_000;
        try
        {
            socket.Connect(to);
            socket.Send(Encoding.ASCII.GetBytes($"PROXY {family} 1000 80\r\n{words}"));
            return socket.Receive(new byte[1]) > 0;
        }
        catch (SocketException e) when (e.SocketErrorCode is SocketError.ConnectionReset or SocketError.Shutdown)
        {
            return false;
        }
    }

    /// <summary>A list with any allow ends with all: where nothing matches ours refuses then, and nginx never.</summary>
    private static List<List<(bool IsAllow, string Who)>> RandomLists(int seed, bool isShort)
    {
        Random random = new(seed);
        List<List<(bool, string)>> lists = [];
        for (int i = 0; i < Lists; i++)
        {
            List<(bool IsAllow, string Who)> list = [];
            for (int n = random.Next(1, 12); n > 0; n--)
            {
                IPAddress address = RandomAddress(random);
                bool isV4 = address.AddressFamily == AddressFamily.InterNetwork || address.IsIPv4MappedToIPv6;
                address = isV4 ? address.MapToIPv4() : address;
                int bits = isV4 ? 32 : 128;
                int prefix = isShort && random.Next(16) == 0 ? random.Next(4) : random.Next(8) == 0 ? bits : bits - random.Next(bits / 2);
                list.Add((random.Next(2) == 0, prefix == bits ? $"{address}" : $"{new IPNetwork(address, prefix)}"));
            }

            bool isAllow = random.Next(2) == 0;
            if (list.Exists(rule => rule.IsAllow) || random.Next(3) == 0)
            {
                list.Add((isAllow, "all"));
            }

            lists.Add(list);
        }

        return lists;
    }

    /// <summary>IPv4, the same within IPv6, and IPv6; of few different bits, so that networks lie within each other.</summary>
    private static IPAddress RandomAddress(Random random)
    {
        byte[] bytes = random.Next(2) == 0 ? [10, 0, 0, 0] : [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (int i = 1; i < bytes.Length; i += bytes.Length / 4)
        {
            bytes[i] = (byte)(random.Next(4) switch { 0 => 0, 1 => 0x80, 2 => 0xff, _ => random.Next(256) });
        }

        IPAddress address = new(bytes);
        return bytes.Length == 4 && random.Next(4) == 0 ? address.MapToIPv6() : address;
    }
}
